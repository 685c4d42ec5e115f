"""Slices, splits and concatenations."""

from __future__ import annotations

from itertools import accumulate

import mlx.core as mx

from smedjan.backends.mlx_metal.table import RULES


@RULES.rule("zeros_like")
def zeros_like(x: mx.array) -> mx.array:
    return mx.zeros_like(x)


@RULES.rule("slice_last")
def slice_last(x: mx.array, *, start: int, stop: int) -> mx.array:
    return x[..., start:stop]


@RULES.rule("slice_last_bwd")
def slice_last_bwd(dy: mx.array, *, size: int, start: int) -> mx.array:
    return mx.pad(dy, [(0, 0)] * (dy.ndim - 1) + [(start, size - start - dy.shape[-1])])


@RULES.rule("split")
def split(x: mx.array, *, sizes: tuple[int, ...], dim: int) -> tuple[mx.array, ...]:
    return tuple(mx.split(x, [*accumulate(sizes)][:-1], axis=dim))


@RULES.rule("concat")
def concat(*parts: mx.array, dim: int) -> mx.array:
    return mx.concatenate(list(parts), axis=dim)


@RULES.rule("narrow")
def narrow(x: mx.array, *, dim: int, start: int, size: int) -> mx.array:
    return mx.split(x, [start, start + size], axis=dim)[1]
