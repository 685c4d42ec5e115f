"""ggml's K-quants: super-blocks of 256 weights, whose groups have scales that are themselves quantized.

    Q4_K, Q5_K   8 groups of 32:  x = d s q - m z     d, m float16; s, z 6 bits; q 4 or 5 bits
    Q6_K        16 groups of 16:  x = d s (q - 32)    d float16; s int8; q 6 bits

A group's scale and minimum are found by trying slightly different step sizes: each rounds the weights to levels, the
levels give the best scale (and minimum) by weighted least squares, and the least weighted error wins. Errors weigh
`rms(group) + |x|` in Q4_K and Q5_K and `x^2` in Q6_K, as in llama.cpp, whose order of float32 operations is kept: the
blocks are the same to the bit as those of its builds without fused multiply-add.

Legend: B super-blocks, G groups, n weights of a group. Groups are columns, [n, G]: sums over axis 0 add row by row, in
ggml's order, and every operation is one pass over contiguous memory.
"""

from __future__ import annotations

import numpy as np

SUPER = 256
"""Weights of a super-block."""

# Below this no group has a scale (ggml's GROUP_MAX_EPS).
_NOTHING = np.float32(1e-15)


def encode_q4_k(values: np.ndarray) -> np.ndarray:
    """float32 [B, 256] -> uint8 [B, 144]: d, m, packed s and z, low nibbles."""
    head, levels = _affine(values, top=15, first=-1.0, steps=21)
    return np.concatenate([head, _nibbles(levels)], axis=1)


def encode_q5_k(values: np.ndarray) -> np.ndarray:
    """float32 [B, 256] -> uint8 [B, 176]: d, m, packed s and z, fifth bits, low nibbles."""
    head, levels = _affine(values, top=31, first=-0.5, steps=16)
    fifth = np.packbits(levels >> 4, axis=1, bitorder="little").reshape(len(levels), 32)
    return np.concatenate([head, fifth, _nibbles(levels & 15)], axis=1)


def encode_q6_k(values: np.ndarray) -> np.ndarray:
    """float32 [B, 256] -> uint8 [B, 210]: low nibbles, upper bit pairs, s, d."""
    x = _columns(values, 16)
    scales = _symmetric_search(x).reshape(-1, 16)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)
    empty = np.abs(largest) < _NOTHING
    inverse = np.float32(-128) / np.where(empty, np.float32(1), largest)
    d = np.where(empty, np.float32(0), 1 / inverse).astype(np.float16)
    s = np.where(empty, np.float32(0), np.minimum(np.rint(inverse * scales), 127)).astype(np.int8)
    step = (d.astype(np.float32) * s).reshape(-1)
    levels = np.clip(np.rint(x / _or_one(step)), -32, 31) + 32
    levels[:, step == 0] = 0
    # A half of a super-block is 4 runs of 32; the low nibbles of runs 0 and 2, 1 and 3 share bytes.
    runs = levels.astype(np.uint8).T.reshape(-1, 2, 4, 32)
    low = (runs[:, :, :2] & 15) | ((runs[:, :, 2:] & 15) << 4)
    high = np.bitwise_or.reduce((runs >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), s.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, axis=1)


def _columns(values: np.ndarray, n: int) -> np.ndarray:
    """[B, 256] -> [n, G], contiguous."""
    return np.ascontiguousarray(values.reshape(-1, n).T)


def _or_one(values: np.ndarray) -> np.ndarray:
    """A divisor: ones for zeros."""
    return np.where(values == 0, np.float32(1), values)


def _nibbles(levels: np.ndarray) -> np.ndarray:
    """[B, 8, 32] levels below 16 -> [B, 128]: groups 2i and 2i + 1 share bytes."""
    return (levels[:, 0::2] | (levels[:, 1::2] << 4)).reshape(-1, 128)


def _affine(values: np.ndarray, *, top: int, first: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """([B, 16] d, m, packed s and z; [B, 8, 32] levels) of [B, 256]"""
    x = _columns(values, 32)
    scales, minima = (found.reshape(-1, 8) for found in _affine_search(x, top=top, first=first, steps=steps))
    (d, s), (m, z) = _six_bits(scales), _six_bits(minima)
    step = (d.astype(np.float32) * s).reshape(-1)
    offset = (m.astype(np.float32) * z).reshape(-1)
    levels = np.clip(np.rint((x + offset) / _or_one(step)), 0, top)
    levels[:, step == 0] = 0
    packed = [s[:, :4] | (s[:, 4:] >> 4 << 6), z[:, :4] | (z[:, 4:] >> 4 << 6), (s[:, 4:] & 15) | (z[:, 4:] & 15) << 4]
    head = np.concatenate([d.view(np.uint8), m.view(np.uint8), *packed], axis=1)
    return head, levels.astype(np.uint8).T.reshape(-1, 8, 32)


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [B, 8] -> (float16 [B, 1], uint8 [B, 8] below 64): value = first * second"""
    # Never negative: a group whose scale is one gets 0 rather than 63.
    largest = np.maximum(values.max(axis=1, keepdims=True), 0)
    inverse = np.where(largest > 0, np.float32(63) / np.where(largest > 0, largest, 1), np.float32(0))
    levels = np.clip(np.rint(inverse * values), 0, 63).astype(np.uint8)
    return (largest / np.float32(63)).astype(np.float16), levels


def _affine_search(x: np.ndarray, *, top: int, first: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the (negated) minimum of each group: float32 [G] each, for x [32, G].

    Step k tries levels q = round((x - min) (top + first + k / 10) / (max - min)), for which
    scale, min = argmin sum w (scale q + min - x)^2 has a closed form; a minimum above zero is taken as zero. The next
    step begins at the best minimum so far.
    """
    weights = np.sqrt((x * x).sum(axis=0) / np.float32(x.shape[0])) + np.abs(x)
    sum_w, sum_x = weights.sum(axis=0), (weights * x).sum(axis=0)
    high = x.max(axis=0)
    minimum = np.minimum(x.min(axis=0), 0)
    flat = high == minimum
    levels, error, work = np.empty_like(x), np.empty_like(x), np.empty_like(x)

    def set_levels(inverse: np.ndarray) -> None:
        np.subtract(x, minimum, out=levels)
        np.multiply(levels, inverse, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, 0, top, out=levels)

    def weighted_error(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        np.multiply(levels, scale, out=error)
        np.add(error, minimum, out=error)
        np.subtract(error, x, out=error)
        np.multiply(error, error, out=error)
        np.multiply(error, weights, out=error)
        return error.sum(axis=0)

    inverse = np.float32(top) / _or_one(high - minimum)
    scale = np.where(flat, np.float32(0), 1 / inverse)
    set_levels(inverse)
    best = weighted_error(scale, minimum)
    for step in range(steps):
        wide = np.float32(first) + np.float32(0.1) * np.float32(step) + np.float32(top)
        set_levels(wide / _or_one(high - minimum))
        np.multiply(weights, levels, out=work)
        sum_l = work.sum(axis=0)
        sum_xl = np.multiply(work, x, out=error).sum(axis=0)
        sum_l2 = np.multiply(work, levels, out=error).sum(axis=0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        usable = determinant > 0
        determinant[~usable] = 1
        tried_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        tried_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = usable & (tried_minimum > 0)
        np.divide(sum_xl, sum_l2, out=tried_scale, where=positive)
        tried_minimum[positive] = 0
        tried_error = weighted_error(tried_scale, tried_minimum)
        better = usable & (tried_error < best)
        for kept, tried in ((best, tried_error), (scale, tried_scale), (minimum, tried_minimum)):
            np.copyto(kept, tried, where=better)
    return scale, -minimum


def _symmetric_search(x: np.ndarray) -> np.ndarray:
    """The scale of each group, float32 [G], for x [16, G].

    Step k tries levels q = round(-x (32 + k / 10) / extreme), for which scale = sum w x q / sum w q^2; the largest
    (sum w x q)^2 / sum w q^2 is the least weighted error.
    """
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    empty = np.abs(extreme) < _NOTHING
    extreme = np.where(empty, np.float32(1), extreme)
    squares = x * x
    cubes = squares * x
    levels, work = np.empty_like(x), np.empty_like(x)

    def sums(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        np.multiply(x, inverse, out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, -32, 31, out=levels)
        along = np.multiply(cubes, levels, out=work).sum(axis=0)
        np.multiply(squares, levels, out=work)
        return along, np.multiply(work, levels, out=work).sum(axis=0)

    along, norm = sums(np.float32(-32) / extreme)
    scale = np.where(norm == 0, np.float32(0), along / _or_one(norm))
    best = scale * along
    for step in (*range(-9, 0), *range(1, 10)):
        along, norm = sums(-(np.float32(32) + np.float32(0.1) * np.float32(step)) / extreme)
        better = (norm > 0) & (along * along > best * norm)
        tried = along / np.where(better, norm, np.float32(1))
        np.copyto(scale, tried, where=better)
        np.copyto(best, tried * along, where=better)
    scale[empty] = 0
    return scale
