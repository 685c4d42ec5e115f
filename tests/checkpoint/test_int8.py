"""Codes of 8 bits: equal to the op's to the bit, and off by no more than half a row's scale."""

from __future__ import annotations

import bitsandbytes
import numpy as np
import pytest
import torch

from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.checkpoint import int8, stored
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_the_ops(dtype: str) -> None:
    """Widened with one rounding, as `int8_dequantize` does."""
    arrays = backend("torch_reference")
    parts = stored.quantize("int8", arrays.to_raw(torch.randn(33, 70)))
    codes, scale = (arrays.from_raw(parts[name]) for name in (int8.CODES, int8.SCALE))
    theirs = ATEN._rules["int8_dequantize"][0].run(codes, scale, dtype=dtype)
    assert torch.equal(arrays.from_raw(stored.dequantize("int8", parts, (33, 70), dtype)), theirs)


def test_codes_are_bitsandbytes() -> None:
    """LLM.int8()'s (Dettmers et al. 2022, eq. 2), which multiply by 127 / max where ours divide: they may differ at a
    tie alone. Its outlier columns are of the input, which here stays as it is."""
    arrays, given = backend("torch_reference"), (torch.randn(256, 513) * 0.05).to(torch.float16)
    theirs, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(given)
    parts = stored.quantize("int8", arrays.to_raw(given))
    ours = arrays.from_raw(parts[int8.CODES])
    np.testing.assert_allclose(arrays.from_raw(parts[int8.SCALE]) * 127, largest, rtol=2.0**-23)
    exact = given.double() * 127 / given.double().abs().amax(1, keepdim=True)
    assert ((exact[ours != theirs].abs() % 1 - 0.5).abs() < 127 * 2.0**-22).all()
    assert (ours == theirs).float().mean() > 0.999
