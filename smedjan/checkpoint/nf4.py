"""NF4 weights in bitsandbytes' format, byte for byte: 4 bits a value, 8 a block's scale. numpy alone.

    codes    uint8 [ceil(n / 2)]            two values a byte, the first in the high bits: NORMAL[code] ~ w / max |w|
    absmax   uint8 [blocks]                 of each BLOCK values, DYNAMIC[absmax] ~ (max |w| - offset) / nested
    nested   float32 [ceil(blocks / 256)]   of each NESTED_BLOCK scales, the largest |max |w| - offset|
    offset   float32 []                     mean of max |w| over all blocks

    w ~ NORMAL[code] * (DYNAMIC[absmax] * nested + offset), each step in float32, then rounded to a dtype once

Values are taken in memory order, whatever the shape; the last block may be short. Dettmers et al., "QLoRA", 2023,
section 3; DYNAMIC is from Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016, section 2.1.

Where the papers leave a choice, bitsandbytes' CPU build (0.50) decides. A value between two codes takes the lower one
up to their midpoint in float32 (the 15 constants in its CUDA kernel are within one ulp of those). A block is multiplied
by the reciprocal of its scale, a short last one divided by it. A scale's code comes from a table of 65,536 steps from
-1 to 1; its CUDA kernel searches for the nearest, which is another one only within half a step of a midpoint. `offset`
alone has no bits to be equal to: bitsandbytes sums in float32, in an order that hangs on the machine and its threads.
Here the sum is float64's, rounded: the same number wherever that float32 sum is exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from smedjan.checkpoint.dtype import convert, to_float32
from smedjan.checkpoint.raw import ITEMSIZE, RawTensor

BLOCK = 64
"""Values that share a scale."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own."""

CODES, ABSMAX, NESTED, OFFSET = "nf4", "absmax", "nested_absmax", "offset"
"""NAME.nf4, NAME.absmax, NAME.nested_absmax, NAME.offset are what a weight NAME is stored as."""

NORMAL = np.array(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    np.float32,
)
"""Quantiles of a normal distribution, scaled to [-1, 1], with 0 among them (Dettmers et al. 2023, appendix E)."""

BOUNDS = (NORMAL[:-1] + NORMAL[1:]) / np.float32(2)
"""A value above BOUNDS[i] has a code above i."""

TINIEST = np.float32(1e-38)
"""The least that a block is divided by; a block of zeros has code 7, which is 0."""

_CHUNK = 1 << 20
_STEPS = 65535
_BINS = 2048
"""Bins of [-1, 1] in `_normal_codes`: finer than any two bounds are apart."""


def _dynamic_map() -> np.ndarray:
    """A sign, an exponent of ten in unary, 10^0 to 10^-6, and the bits that are left as a fraction in [0.1, 1)."""
    found = [np.float32(0), np.float32(1)]
    start, stop = np.float32(0.1), np.float32(1)
    for exponent in range(7):
        count = 2**exponent
        step, index = np.float64((stop - start) / np.float32(count)), np.arange(count + 1)
        # As torch.linspace makes them: from both ends, each with one rounding.
        edges = np.where(index < (count + 1) // 2, start + step * index, stop - step * index[::-1]).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


DYNAMIC = _dynamic_map()
"""The 256 values of a scale's code, ascending."""

_NEAREST = np.searchsorted(
    (DYNAMIC[:-1] + DYNAMIC[1:]) * np.float32(0.5),
    np.arange(_STEPS + 1, dtype=np.float32) * np.float32(2) / np.float32(_STEPS) - np.float32(1),
).astype(np.uint8)
"""The code of each of the steps from -1 to 1."""


def _bin(scaled: np.ndarray) -> np.ndarray:
    return ((scaled + np.float32(1)) * np.float32(_BINS / 2)).astype(np.int16)


_BELOW = np.searchsorted(_bin(BOUNDS), np.arange(_BINS + 1)).astype(np.uint8)
"""How many bounds lie in the bins before each."""
_NEXT = np.append(BOUNDS, np.float32(np.inf))


def _normal_codes(scaled: np.ndarray) -> np.ndarray:
    """How many of BOUNDS each value is above: `np.searchsorted(BOUNDS, scaled)`, in a third of its time. `_bin` never
    falls, so that bounds of earlier bins are below, those of later ones above, and a bin's own is compared."""
    below = _BELOW[_bin(np.clip(scaled, -1, 1))]
    return below + (scaled > _NEXT[below])


def blocks_of(numel: int) -> int:
    return -(-numel // BLOCK)


def quantize(tensor: RawTensor) -> dict[str, RawTensor]:
    """A float tensor of any shape -> {nf4, absmax, nested_absmax, offset}. Every value must be finite."""
    assert tensor.numel > 0, "an empty weight has no scale"
    codes = np.empty(-(-tensor.numel // 2), np.uint8)
    absmax = np.empty(blocks_of(tensor.numel), np.float32)
    data, size = tensor.data.cast("B"), ITEMSIZE[tensor.dtype]
    for start in range(0, tensor.numel, _CHUNK):
        stop = min(start + _CHUNK, tensor.numel)
        part = RawTensor(dtype=tensor.dtype, shape=(stop - start,), data=data[start * size : stop * size])
        packed, scales = quantize_values(to_float32(part))
        codes[start // 2 : start // 2 + len(packed)] = packed
        absmax[start // BLOCK : start // BLOCK + len(scales)] = scales
    offset = np.float32(absmax.mean(dtype=np.float64))
    nested_codes, nested = quantize_scales(absmax - offset)
    made = {CODES: codes, ABSMAX: nested_codes, NESTED: nested, OFFSET: np.array(offset)}
    return {name: RawTensor.of(array) for name, array in made.items()}


def quantize_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n] -> packed codes [ceil(n / 2)], max |w| of each block."""
    whole = len(values) // BLOCK * BLOCK
    blocks = values[:whole].reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1, initial=0)
    scaled = (blocks * (np.float32(1) / np.maximum(absmax, TINIEST))[:, None]).reshape(-1)
    if whole < len(values):
        last = np.maximum(np.abs(values[whole:]).max(), TINIEST)
        absmax = np.append(absmax, last)
        scaled = np.append(scaled, values[whole:] / last)
    if len(scaled) % 2:
        scaled = np.append(scaled, np.float32(0))
    codes = _normal_codes(scaled)
    return codes[::2] << 4 | codes[1::2], absmax


def quantize_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [blocks], the offset taken off already -> uint8 codes, the largest magnitude of each NESTED_BLOCK."""
    nested = np.maximum.reduceat(np.abs(scales), np.arange(0, len(scales), NESTED_BLOCK))
    each = np.repeat(nested, NESTED_BLOCK)[: len(scales)]
    with np.errstate(over="ignore", invalid="ignore"):
        # The reciprocal of a subnormal number may be infinite; a scale of 0 beside it has code 0.
        scaled = np.nan_to_num(scales * (np.float32(1) / np.where(each == 0, np.float32(1), each)), nan=-1.0)
    half = (np.clip(scaled, -1, 1) + np.float32(1)) * np.float32(0.5)
    # In float64, where nothing is rounded, then once: a fused multiply-add.
    step = (half.astype(np.float64) * _STEPS + 0.5).astype(np.float32).astype(np.int64)
    # All scales equal: bitsandbytes writes code 0, which times 0 is 0.
    return np.where(each == 0, 0, _NEAREST[step]).astype(np.uint8), nested


def dequantize(parts: Mapping[str, RawTensor], shape: tuple[int, ...], dtype: str) -> RawTensor:
    """{nf4, absmax, nested_absmax, offset} -> the weight of that shape."""
    codes, scales = (np.frombuffer(parts[name].data, np.uint8) for name in (CODES, ABSMAX))
    nested, offset = to_float32(parts[NESTED]), to_float32(parts[OFFSET])[0]
    absmax = DYNAMIC[scales] * np.repeat(nested, NESTED_BLOCK)[: len(scales)] + offset
    numel = int(np.prod(shape))
    out = np.empty(numel, np.float32)
    for start in range(0, numel, _CHUNK):
        stop = min(start + _CHUNK, numel)
        packed = codes[start // 2 : -(-stop // 2)]
        values = NORMAL[np.stack((packed >> 4, packed & 15), axis=-1)].reshape(-1)[: stop - start]
        each = np.repeat(absmax[start // BLOCK : blocks_of(stop)], BLOCK)[: stop - start]
        np.multiply(values, each, out=out[start:stop])
    whole = RawTensor.of(out)
    return convert(RawTensor(dtype="float32", shape=shape, data=whole.data), dtype)
