"""Weights of 8 bits, a scale a row: `ops/quantized.py`'s int8, made from stored tensors without torch.

    scale = max |w| / 127 over each row;  codes = w / scale to the nearest integer, ties to even;  w ~ codes * scale

A value is off by at most half its row's scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.raw import RawTensor

CODES, SCALE = "int8", "scale"
"""Suffixes of a weight's name."""

_ROWS = 4096


def quantize(tensor: RawTensor) -> tuple[dict[str, RawTensor], float, float]:
    """A float tensor [O, I] -> {int8, scale}, and the sums of the squares of w and of w - codes * scale."""
    rows, columns = tensor.shape
    values = to_float32(tensor).reshape(rows, columns)
    codes, scale = np.empty((rows, columns), np.int8), np.empty(rows, np.float32)
    squares = missed = 0.0
    for start in range(0, rows, _ROWS):
        part = values[start : start + _ROWS]
        each = np.abs(part).max(axis=1) / np.float32(127)
        rounded = np.rint(part / np.where(each == 0, np.float32(1), each)[:, None]).clip(-127, 127)
        codes[start : start + _ROWS], scale[start : start + _ROWS] = rounded, each
        rounded *= each[:, None]
        rounded -= part
        squares += float(np.vdot(part, part))
        missed += float(np.vdot(rounded, rounded))
    return {CODES: RawTensor.of(codes), SCALE: RawTensor.of(scale)}, squares, missed


def dequantize(parts: Mapping[str, RawTensor]) -> np.ndarray:
    """{int8, scale} -> w as codes * scale, float32 [O, I]"""
    codes = np.frombuffer(parts[CODES].data, np.int8).reshape(parts[CODES].shape)
    return codes.astype(np.float32) * to_float32(parts[SCALE])[:, None]
