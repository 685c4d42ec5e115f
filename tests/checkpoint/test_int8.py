"""Codes of 8 bits: equal to the op's to the bit, and off by no more than half a row's scale."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.checkpoint import int8
from smedjan.checkpoint.dtype import to_float32
from smedjan.runtime.select import backend


def test_a_head_in_eight_bits_is_off_by_no_more_than_its_scales_allow() -> None:
    """|y - y'| <= sum |x| scale / 2 of each logit, and what float32 rounds."""
    h, w = torch.randn(64, dtype=torch.float64), torch.randn(97, 64)
    parts, squares, missed = int8.quantize(backend("torch_reference").to_raw(w))
    values = torch.from_numpy(int8.dequantize(parts)).double()
    scale = torch.from_numpy(to_float32(parts["scale"])).double()
    off = ((values - w.double()) @ h).abs()
    assert (off <= h.abs().sum() * scale / 2 * (1 + 2**-20)).all()
    assert off.max() > 0
    exact = ((values - w.double()).norm() / w.double().norm()).item()
    assert (missed / squares) ** 0.5 == pytest.approx(exact, rel=1e-4)


def test_codes_are_the_ops() -> None:
    """The stored form and `int8_quantize` are equal to the bit; a row of zeros is zeros."""
    w = torch.randn(33, 70)
    w[4] = 0
    w[5, 3] = 2.0**-140
    parts, *_ = int8.quantize(backend("torch_reference").to_raw(w))
    codes, scale = ATEN._rules["int8_quantize"][0].run(w)
    assert bytes(parts["int8"].data) == codes.numpy().tobytes()
    assert bytes(parts["scale"].data) == scale.numpy().tobytes()
