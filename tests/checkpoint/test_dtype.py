"""Our float conversions are torch's to the bit, and no NaN or infinity hides."""

import itertools

import numpy as np
import pytest
import torch

from smedjan.checkpoint import dtype as dtypes
from smedjan.checkpoint.dtype import FLOATS, convert, first_nonfinite
from smedjan.checkpoint.raw import RawTensor

TORCH = {name: getattr(torch, name) for name in FLOATS}


def raw(tensor: torch.Tensor) -> RawTensor:
    data = memoryview(tensor.contiguous().view(torch.uint8).numpy().reshape(-1))
    return RawTensor(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), data=data)


def values() -> torch.Tensor:
    """Every exponent, both neighbours of every tie of bfloat16 and of float16, subnormals, zeros, infinities, NaN."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    halves = np.arange(0, 1 << 16, dtype=np.uint32) << 16
    ties = np.concatenate([halves | 0x8000, halves | 0x7FFF, halves | 0x8001, halves | 0x1000, halves | 0x3000, halves])
    return torch.from_numpy(np.concatenate([bits, ties]).view(np.float32).copy())


@pytest.mark.parametrize(("source", "target"), itertools.permutations(FLOATS, 2))
def test_conversion_equals_torch_bit_for_bit(source: str, target: str) -> None:
    """All pairs, over all 2^16 patterns of the half types and 600,000 floats at and around every tie."""
    if source in ("bfloat16", "float16"):
        given = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(TORCH[source])
    else:
        given = values().to(TORCH[source])
    expected = given.to(TORCH[target])
    found = torch.frombuffer(bytearray(convert(raw(given), target).data), dtype=TORCH[target])
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(found), nan)
    assert torch.equal(found[~nan].view(torch.uint8), expected[~nan].view(torch.uint8))


def test_shape_is_kept_and_the_same_dtype_is_the_same_object() -> None:
    tensor = raw(torch.randn(3, 0, 5))
    assert convert(tensor, "bfloat16").shape == (3, 0, 5)
    assert convert(tensor, "float32") is tensor


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_first_nonfinite_names_the_first(name: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a later chunk; the largest finite value is not one."""
    monkeypatch.setattr(dtypes, "_CHUNK", 8)
    tensor = torch.full((30,), torch.finfo(TORCH[name]).max, dtype=TORCH[name])
    assert first_nonfinite(raw(tensor)) is None
    tensor[[19, 25]] = bad
    assert first_nonfinite(raw(tensor)) == 19
