"""Rows by index. Backwards they are summed in float32 and rounded once."""

from __future__ import annotations

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import wide
from smedjan.backends.mlx_metal.linear import rows as flat_rows
from smedjan.backends.mlx_metal.table import RULES


@RULES.rule("embedding")
def embedding(input_ids: mx.array, weight: mx.array, *, padding_idx: int | None) -> mx.array:
    return weight[input_ids]


@RULES.rule("embedding_bwd")
def embedding_bwd(dy: mx.array, input_ids: mx.array, *, vocab_size: int, padding_idx: int | None) -> mx.array:
    cotangent, ids = wide(flat_rows(dy)), input_ids.reshape(-1)
    if padding_idx is not None:
        cotangent = mx.where((ids == padding_idx)[:, None], 0.0, cotangent)
    total = mx.zeros((vocab_size, dy.shape[-1]), dtype=mx.float32)
    return total.at[ids].add(cotangent).astype(dy.dtype)


@RULES.rule("take_rows")
def take_rows(x: mx.array, rows: mx.array) -> mx.array:
    return x[rows]


@RULES.rule("take_rows_bwd")
def take_rows_bwd(dy: mx.array, rows: mx.array, *, size: int) -> mx.array:
    dx = mx.zeros((size, dy.shape[1]), dtype=dy.dtype)
    dx[rows] = dy
    return dx
