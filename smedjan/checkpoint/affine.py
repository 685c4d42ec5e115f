"""Weights in MLX's affine format, byte for byte: `ops/quantized.py`'s, made and read without MLX. numpy alone.

    weight  uint32 [O, I * bits / 32]    each row a stream of codes, the lowest bit first
    scales  [O, I / group_size]          in the model's dtype, as are
    biases  [O, I / group_size]

    w ~ scale * code + bias; the product and the sum are each rounded to the dtype, as on MLX's CPU build

A group's scale is (max - min) / (2^bits - 1), its sign that of the smaller magnitude, moved so that 0 is a code or
nearly: bias is the value of the larger magnitude, scale = bias / round(bias / scale). Codes are taken with both in
float32, before they are rounded to the dtype. As MLX 0.32's CPU build computes it, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from smedjan.checkpoint.dtype import convert, to_float32
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor

WEIGHT, SCALES, BIASES = "weight", "scales", "biases"
"""MODULE.weight, MODULE.scales and MODULE.biases in files."""

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AffineTensor(LazyTensor):
    """A weight that is stored in few bits: `load` gives it dequantised, `stored` as it is stored."""

    bits: int
    group_size: int
    stored: Mapping[str, LazyTensor]


def affine_of(tensors: Mapping[str, RawTensor]) -> dict[str, AffineTensor]:
    """Those of the tensors that are stored in this format."""
    entries = tensors.entries if isinstance(tensors, LazyTensors) else {}
    return {name: entry for name, entry in entries.items() if isinstance(entry, AffineTensor)}


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [O, W] -> codes uint8 [O, W * 32 / bits]"""
    rows = packed.shape[0]
    stream = np.unpackbits(packed.view(np.uint8).reshape(-1), bitorder="little").reshape(-1, bits)
    return np.packbits(stream, axis=1, bitorder="little").reshape(rows, -1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes uint8 [O, I] -> uint32 [O, I * bits / 32]"""
    stream = np.unpackbits(codes.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(-1), bitorder="little").view("<u4").reshape(codes.shape[0], -1)


def quantize(tensor: RawTensor, *, bits: int, group_size: int) -> dict[str, RawTensor]:
    """A float tensor [O, I] -> {weight, scales, biases}. Every value must be finite."""
    rows, columns = tensor.shape
    assert columns % group_size == 0, f"{columns} columns in groups of {group_size}"
    codes = np.empty((rows, columns * bits // 32), np.uint32)
    scales, biases = (np.empty((rows, columns // group_size), np.float32) for _ in range(2))
    step = max(1, _CHUNK // columns)
    values = to_float32(tensor).reshape(rows, columns)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        codes[some], scales[some], biases[some] = _quantize(values[some], bits, group_size)
    made = {SCALES: scales, BIASES: biases}
    return {WEIGHT: RawTensor.of(codes)} | {
        name: convert(RawTensor.of(array), tensor.dtype) for name, array in made.items()
    }


def _quantize(values: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    groups = values.reshape(len(values), -1, group_size)
    bins = np.float32((1 << bits) - 1)
    high, low = groups.max(-1), groups.min(-1)
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / bins, np.float32(1e-7))
    scale = np.where(below, scale, -scale)
    edge = np.where(below, low, high)
    steps = np.rint(edge / scale)
    zero = steps == 0
    scale = np.where(zero, scale, edge / np.where(zero, np.float32(1), steps))
    bias = np.where(zero, np.float32(0), edge)
    codes = np.rint((groups - bias[..., None]) / scale[..., None]).clip(0, bins).astype(np.uint8)
    return pack(codes.reshape(values.shape), bits), scale, bias


def dequantize(parts: Mapping[str, RawTensor], *, bits: int, group_size: int) -> Iterator[RawTensor]:
    """{weight, scales, biases} -> the weight in the dtype of its scales, as consecutive flat parts."""
    packed, scales, biases = (parts[name] for name in (WEIGHT, SCALES, BIASES))
    rows, dtype = packed.shape[0], scales.dtype
    words = np.frombuffer(packed.data, "<u4").reshape(rows, -1)
    wide = [to_float32(part).reshape(rows, -1, 1) for part in (scales, biases)]
    step = max(1, _CHUNK // (wide[0].shape[1] * group_size))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        scale, bias = wide[0][some], wide[1][some]
        codes = unpack(words[some], bits).reshape(*scale.shape[:2], group_size)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever reads it looks for NaN and infinity
            product = to_float32(convert(RawTensor.of(codes.astype(np.float32) * scale), dtype)).reshape(codes.shape)
            whole = convert(RawTensor.of(product + bias), dtype)
        yield RawTensor(dtype=dtype, shape=(whole.numel,), data=whole.data)
