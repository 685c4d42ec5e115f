"""Tensors in the types that GGUF files store, chunk by chunk: bounded memory, all cores, llama.cpp's values to the bit.

    F32, F16, BF16   the values, narrowing rounds to nearest even
    Q8_0             blocks of 32:  x = d q           d float16, q int8
    Q4_0, Q5_0       blocks of 32:  x = d (q - top)   d float16, q 4 or 5 bits, top = 8 or 16
    Q5_1             blocks of 32:  x = d q + m       d, m float16, q 5 bits
    Q4_K, Q5_K, Q6_K super-blocks of 256: `gguf_kquants`

Where a step is so small that its float16 is zero, the block is zeros. NaN, infinity and values that the type cannot
hold are refused.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from smedjan.checkpoint.dtype import convert, first_nonfinite, to_float32
from smedjan.checkpoint.gguf_kquants import encode_q4_k, encode_q5_k, encode_q6_k
from smedjan.checkpoint.raw import ITEMSIZE, RawTensor
from smedjan.errors import CheckpointError

# Weights of a task, and of one call of an encoder: its dozen arrays stay in the second-level cache.
_TASK, _TILE = 1 << 20, 1 << 16


def encoded_size(shape: tuple[int, ...], quantization: str) -> int:
    """The bytes of a tensor of `shape`, whose rows must be whole blocks."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[quantization]]
    assert shape[-1] % block == 0, f"rows of {shape[-1]} as {quantization}"
    return prod(shape) // block * size


def encode(
    tensor: RawTensor, quantization: str, *, name: str, file: Path | None = None, workers: int | None = None
) -> Iterator[np.ndarray]:
    """The bytes of a float tensor as `quantization`, in order, as uint8 arrays; `name` and `file` are for messages."""
    assert quantization in ENCODERS, f"{quantization} is not written"
    encoded_size(tensor.shape, quantization)
    task = partial(_encode_range, tensor, quantization, name, file)
    ranges = [(start, min(start + _TASK, tensor.numel)) for start in range(0, tensor.numel, _TASK)]
    workers = min(workers or os.cpu_count() or 1, len(ranges))
    if workers <= 1:
        yield from (task(*bounds) for bounds in ranges)
        return
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for bounds in ranges:
                waiting.append(pool.submit(task, *bounds))
                # A few tasks ahead and no more: memory does not grow with the tensor.
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _encode_range(
    tensor: RawTensor, quantization: str, name: str, file: Path | None, start: int, stop: int
) -> np.ndarray:
    """The bytes of the elements from `start` to `stop`, whole blocks."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[quantization]]
    out = np.empty(((stop - start) // block, size), np.uint8)
    for at in range(start, stop, _TILE):
        end = min(at + _TILE, stop)
        item = ITEMSIZE[tensor.dtype]
        part = RawTensor(dtype=tensor.dtype, shape=(end - at,), data=tensor.data[at * item : end * item])
        bad = first_nonfinite(part)
        if bad is not None:
            raise CheckpointError(
                f"element {at + bad} is {to_float32(part)[bad]}",
                file=file,
                field=name,
                remedy="only finite weights are exported",
            )
        rows = out[(at - start) // block : (end - start) // block]
        if tensor.dtype == _STORED.get(quantization):
            rows[:] = np.frombuffer(part.data, np.uint8).reshape(rows.shape)
            continue
        values = to_float32(part)
        # Overflow shows in what is written, below; a step too small to divide by makes a block of zeros.
        with np.errstate(all="ignore"):
            rows[:] = ENCODERS[quantization](values.reshape(-1, block))
        if not _in_range(rows, quantization):
            raise CheckpointError(
                f"holds {values[np.abs(values).argmax()]:g}, more than {quantization} can",
                file=file,
                field=name,
                remedy="export as BF16 or F32",
            )
    return out.reshape(-1)


# What is copied as it is.
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WORDS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}

# Where the float16 scales of a block stand.
_SCALES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def _in_range(blocks: np.ndarray, quantization: str) -> bool:
    """No float that is written, value or scale, has become infinite."""
    if quantization in _STORED:
        return first_nonfinite(RawTensor.of(blocks.view(_WORDS[quantization]), _STORED[quantization])) is None
    scales = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16) for at in _SCALES[quantization]]
    return all(bool(np.isfinite(scale).all()) for scale in scales)


def _extreme(values: np.ndarray) -> np.ndarray:
    """[B, 32] -> [B, 1]: the (first) value of largest magnitude, with its sign."""
    return np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)


def _inverse(step: np.ndarray) -> np.ndarray:
    """1 / step, and 0 where that is no number."""
    inverse = 1 / np.where(step == 0, np.float32(1), step)
    return np.where((step == 0) | np.isinf(inverse), np.float32(0), inverse)


def _halves(levels: np.ndarray) -> np.ndarray:
    """[B, 32] levels below 16 -> [B, 16]: the first 16 in the low nibbles."""
    return levels[:, :16] | (levels[:, 16:] << 4)


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([part.view(np.uint8) for part in parts], axis=1)


def _encode_f32(values: np.ndarray) -> np.ndarray:
    return values.astype("<f4", copy=False).view(np.uint8)


def _encode_f16(values: np.ndarray) -> np.ndarray:
    return values.astype("<f2").view(np.uint8)


def _encode_bf16(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(convert(RawTensor.of(values), "bfloat16").data, np.uint8).reshape(-1, 2)


def _encode_q8_0(values: np.ndarray) -> np.ndarray:
    step = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = values * _inverse(step)
    # C's roundf: halves away from zero. x - trunc(x) is exact, x + 0.5 would not be.
    whole = np.trunc(scaled)
    levels = whole + np.copysign(np.float32(1), scaled) * (np.abs(scaled - whole) >= 0.5)
    return _join(step.astype("<f2"), levels.astype(np.int8))


def _offset(values: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(d float16 [B, 1], levels uint8 [B, 32] below 2 top): the extreme value becomes level 0."""
    step = _extreme(values) / np.float32(-top)
    levels = np.trunc(values * _inverse(step) + np.float32(top + 0.5))
    return step.astype("<f2"), np.minimum(levels, 2 * top - 1).astype(np.uint8)


def _encode_q4_0(values: np.ndarray) -> np.ndarray:
    step, levels = _offset(values, 8)
    return _join(step, _halves(levels))


def _encode_q5_0(values: np.ndarray) -> np.ndarray:
    step, levels = _offset(values, 16)
    return _join(step, np.packbits(levels >> 4, axis=1, bitorder="little"), _halves(levels & 15))


def _encode_q5_1(values: np.ndarray) -> np.ndarray:
    low = values.min(axis=1, keepdims=True)
    step = (values.max(axis=1, keepdims=True) - low) / np.float32(31)
    levels = np.trunc((values - low) * _inverse(step) + np.float32(0.5)).astype(np.uint8)
    fifth = np.packbits(levels >> 4, axis=1, bitorder="little")
    return _join(step.astype("<f2"), low.astype("<f2"), fifth, _halves(levels & 15))


ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _encode_f32,
    "F16": _encode_f16,
    "BF16": _encode_bf16,
    "Q8_0": _encode_q8_0,
    "Q4_0": _encode_q4_0,
    "Q5_0": _encode_q5_0,
    "Q5_1": _encode_q5_1,
    "Q4_K": encode_q4_k,
    "Q5_K": encode_q5_k,
    "Q6_K": encode_q6_k,
}
"""Each takes finite float32 [B, weights of a block] and gives uint8 [B, bytes of a block]."""
