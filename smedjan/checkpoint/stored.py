"""Weights of few bits by the name of their format: those of `ops/quantized.py`, STORED."""

from __future__ import annotations

from collections.abc import Mapping

from smedjan.checkpoint import int8, nf4
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.raw import RawTensor

FORMATS = ("nf4", "int8")


def quantize(storage: str, tensor: RawTensor) -> dict[str, RawTensor]:
    """A float tensor [O, I] -> its parts, by the suffixes of their names."""
    assert storage in FORMATS, storage
    return nf4.quantize(tensor) if storage == "nf4" else int8.quantize(tensor)[0]


def dequantize(storage: str, parts: Mapping[str, RawTensor], shape: tuple[int, ...], dtype: str) -> RawTensor:
    """The weight of those parts, widened in float32 and rounded once."""
    assert storage in FORMATS, storage
    if storage == "nf4":
        return nf4.dequantize(parts, shape, dtype)
    return convert(RawTensor.of(int8.dequantize(parts)), dtype)
