"""MLX's affine format, made and read by numpy: equal to MLX's CPU build to the bit, as the op on torch_reference is."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from smedjan.backends.mlx_metal import backend as mlx_backend
from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.backends.torch_reference import backend as torch_backend
from smedjan.checkpoint import affine
from smedjan.checkpoint.raw import RawTensor
from smedjan.ops.quantized import AFFINE_BITS, AFFINE_GROUPS

MLX, TORCH = mlx_backend(), torch_backend()
DTYPES = ("float32", "bfloat16", "float16")


def values(*shape: int) -> torch.Tensor:
    """Groups of every kind: normal, of one sign, of one value, zeros, tiny, with a single large value."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.1
    made[1], made[2], made[3], made[4] = made[1].abs(), -made[2].abs(), 0.3, 0.0
    made[5] *= 1e-9
    made[6, ::40] = 7.0
    made[7] += 3.0
    return made


def raw_of(tensor: torch.Tensor) -> RawTensor:
    return TORCH.to_raw(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", AFFINE_GROUPS)
def test_bits_of_mlx(bits: int, group_size: int, dtype: str) -> None:
    tensor = values(11, 256).to(getattr(torch, dtype))
    parts = affine.quantize(raw_of(tensor), bits=bits, group_size=group_size)
    theirs = mx.quantize(MLX.from_raw(raw_of(tensor)), group_size=group_size, bits=bits)
    for (suffix, part), array in zip(parts.items(), theirs, strict=True):
        other = MLX.to_raw(array)
        assert (part.dtype, part.shape) == (other.dtype, other.shape), suffix
        assert bytes(part.data) == bytes(other.data), suffix
    expected = bytes(MLX.to_raw(mx.dequantize(*theirs, group_size=group_size, bits=bits)).data)
    joined = b"".join(bytes(p.data) for p in affine.dequantize(parts, bits=bits, group_size=group_size))
    assert joined == expected
    run = ATEN._rules["affine_dequantize"][0].run
    found = run(*(TORCH.from_raw(part) for part in parts.values()), bits=bits, group_size=group_size)
    assert bytes(raw_of(found).data) == expected


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_codes_are_a_stream_of_bits_the_lowest_first(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 64)).astype(np.uint8)
    packed = affine.pack(codes, bits)
    assert packed.shape == (3, 2 * bits)
    assert np.array_equal(affine.unpack(packed, bits), codes)
    row = sum(int(word) << 32 * at for at, word in enumerate(packed[1]))
    assert [row >> bits * at & (1 << bits) - 1 for at in range(64)] == codes[1].tolist()


def test_large_weights_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = affine.quantize(raw_of(values(11, 128)), bits=3, group_size=32)
    monkeypatch.setattr(affine, "_CHUNK", 300)
    parts = affine.quantize(raw_of(values(11, 128)), bits=3, group_size=32)
    assert {name: bytes(part.data) for name, part in parts.items()} == {n: bytes(p.data) for n, p in whole.items()}
    assert len(list(affine.dequantize(parts, bits=3, group_size=32))) == 6
