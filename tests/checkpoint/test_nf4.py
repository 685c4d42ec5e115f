"""NF4 beside bitsandbytes' CPU build: codes, scales, their codes and the values that come back, byte for byte."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from smedjan.backends.torch_reference.elementwise import NAMES
from smedjan.checkpoint import nf4
from smedjan.checkpoint.raw import RawTensor
from smedjan.ops import quantized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 2), (3, 5), (1, 63), (8, 8), (5, 13), (7, 64), (129, 33), (63, 257), (128, 128), (576, 192)]

CUDA_TREE = [
    *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
    *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
    *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
]
"""dQuantizeNF4's constants (bitsandbytes, csrc/kernels.cu)."""


def raw(tensor: torch.Tensor) -> RawTensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return RawTensor(dtype=NAMES[tensor.dtype], shape=tuple(tensor.shape), data=memoryview(data))


def weights(shape: tuple[int, ...], dtype: torch.dtype, *, scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def theirs(weight: torch.Tensor):
    """(packed codes, scales before they are quantised, the quantised state)"""
    packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4", blocksize=64)
    _, plain = bnb.quantize_4bit(weight, compress_statistics=False, quant_type="nf4", blocksize=64)
    return packed.reshape(-1), plain.absmax, state


def assert_bytes(ours: RawTensor, other: torch.Tensor, name: str) -> None:
    assert ours.dtype == NAMES[other.dtype], name
    assert bytes(ours.data) == bytes(raw(other).data), name


def assert_equal(weight: torch.Tensor, *, exact_sum: bool) -> None:
    """All four arrays. Where bitsandbytes' float32 sum of the scales rounds, so does its offset: then the scales' codes
    are compared with that offset taken over, and the offsets by the error of such a sum."""
    packed, absmax, state = theirs(weight)
    ours = nf4.quantize(raw(weight))
    assert_bytes(ours["nf4"], packed, "codes")
    if exact_sum:
        assert_bytes(ours["offset"], state.offset, "offset")
        assert_bytes(ours["absmax"], state.absmax, "codes of the scales")
        assert_bytes(ours["nested_absmax"], state.state2.absmax, "nested scales")
    offset = np.frombuffer(ours["offset"].data, np.float32)[0]
    # Pairwise or by lanes, as torch sums: log2(n) roundings of at most the sum, and that of the division.
    assert abs(offset - float(state.offset)) <= (np.log2(len(absmax)) + 2) * 2.0**-24 * offset
    codes, nested = nf4.quantize_scales((absmax - state.offset).numpy())
    assert np.array_equal(codes, state.absmax.numpy())
    assert np.array_equal(nested, state.state2.absmax.numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_array_is_bitsandbytes(shape, dtype):
    """Of a bfloat16 model's weights, whose scales have 8 bits, the whole file is the same."""
    assert_equal(weights(shape, dtype), exact_sum=dtype == torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e30])
def test_any_magnitude(scale):
    assert_equal(weights((37, 64), torch.float32, scale=scale), exact_sum=False)


def test_more_than_a_chunk():
    assert_equal(weights((1111, 1000), torch.bfloat16), exact_sum=True)


@pytest.mark.parametrize("case", ["all zero", "a block of zeros", "equal scales", "one large value", "subnormal"])
def test_corners(case):
    weight = weights((17, 64), torch.float32)
    if case == "all zero":
        weight.zero_()
    elif case == "a block of zeros":
        weight[3] = 0
    elif case == "equal scales":
        weight = weight.clamp(-0.03125, 0.03125)
        weight[:, 0] = 0.03125
    elif case == "one large value":
        weight[5, 7] = 1e6
    else:
        weight *= 1e-42
    assert_equal(weight, exact_sum=case in ("all zero", "equal scales"))


def test_ties_and_their_neighbours():
    """Every bound, and the number on each side of it, in a block of scale 1 and in a short one."""
    bounds = torch.from_numpy(nf4.BOUNDS)
    near = [bounds, *(torch.nextafter(bounds, torch.full_like(bounds, side)) for side in (-2.0, 2.0))]
    values = torch.cat([*near, torch.from_numpy(nf4.NORMAL)])
    block = torch.cat((values, torch.ones(64 - len(values))))
    assert_equal(block[None], exact_sum=True)
    assert_equal(torch.cat((block, values))[None], exact_sum=True)


def test_scales_at_every_step_of_the_table():
    """Codes of scales that lie on and beside the midpoints of the dynamic map."""
    middles = torch.from_numpy((nf4.DYNAMIC[1:] + nf4.DYNAMIC[:-1]) / 2)
    shifts = (torch.nextafter(middles, torch.full_like(middles, side)) for side in (-2.0, 2.0))
    parts = (middles, *shifts, torch.from_numpy(nf4.DYNAMIC)[:255])
    scales = torch.cat([torch.cat((part, torch.ones(1))) for part in parts])
    codes, state = bnb.quantize_blockwise(scales, blocksize=256)
    ours, nested = nf4.quantize_scales(scales.numpy())
    assert np.array_equal(ours, codes.numpy())
    assert np.array_equal(nested, state.absmax.numpy())


def test_the_tables_are_theirs():
    assert np.array_equal(nf4.NORMAL, bnb.get_4bit_type("nf4", device="cpu").numpy())
    assert np.array_equal(nf4.DYNAMIC, bnb.create_dynamic_map().numpy())


def test_the_bounds_are_the_cuda_kernels_to_an_ulp():
    tree = np.array(CUDA_TREE, np.float32)
    assert (np.abs(tree - nf4.BOUNDS) <= np.spacing(np.abs(tree))).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1] % 2 == 0], ids=str)
def test_what_comes_back_is_bitsandbytes(shape, dtype):
    """Of their arrays. (An odd last dim takes their way through torch.compile.)"""
    packed, _, state = theirs(weights(shape, dtype))
    parts = {"nf4": packed, "absmax": state.absmax, "nested_absmax": state.state2.absmax, "offset": state.offset}
    ours = nf4.dequantize({name: raw(part) for name, part in parts.items()}, shape, NAMES[dtype])
    assert_bytes(ours, bnb.dequantize_4bit(packed, state), "weights")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arrays_are_as_the_ops_declare_them(shape):
    made = nf4.quantize(raw(weights(shape, torch.float32)))
    specs = quantized.nf4_specs(shape)
    assert list(made) == list(specs)
    assert {name: (part.shape, part.dtype) for name, part in made.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert (nf4.BLOCK, nf4.NESTED_BLOCK) == (quantized.BLOCK, quantized.NESTED_BLOCK)


def _swapped(parts: dict[str, np.ndarray]) -> None:
    parts["nf4"] = parts["nf4"] << 4 | parts["nf4"] >> 4


def _no_offset(parts: dict[str, np.ndarray]) -> None:
    parts["offset"] = np.zeros_like(parts["offset"])


def _wrong_nested(parts: dict[str, np.ndarray]) -> None:
    parts["nested_absmax"] = np.roll(parts["nested_absmax"], 1)


def _block_off_by_one(parts: dict[str, np.ndarray]) -> None:
    parts["absmax"] = np.roll(parts["absmax"], 1)


@pytest.mark.parametrize("damage", [_swapped, _no_offset, _wrong_nested, _block_off_by_one])
def test_a_damaged_array_is_another_weight(damage):
    """What comes back is within half the widest gap of its block's scale; a mutation of the format is not."""
    weight = weights((300, 64), torch.float32)
    weight[256:] *= 3
    made = nf4.quantize(raw(weight))
    parts = {name: np.frombuffer(part.data, part.dtype).copy() for name, part in made.items()}
    widest = float(np.diff(nf4.NORMAL).max()) / 2
    # And the scale's own code is off by at most a gap of the dynamic map.
    scale_off = np.diff(nf4.DYNAMIC).max() * float(parts["nested_absmax"].max())
    room = widest * weight.abs().amax(1, keepdim=True) + scale_off

    def near() -> bool:
        found = nf4.dequantize({name: RawTensor.of(part) for name, part in parts.items()}, (300, 64), "float32")
        values = torch.frombuffer(bytearray(found.data), dtype=torch.float32).view(300, 64)
        return bool(((values - weight).abs() <= room).all())

    parts["offset"] = parts["offset"].reshape(())
    assert near()
    damage(parts)
    assert not near()
