"""The embedding, rows by index, and their gradients on Triton: rules over `kernels/embedding.py`. Formulas there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import embedding as kernels
from smedjan.backends.cuda_triton.layout import walk_tile
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows

NO_PADDING = -1
"""No token's id."""

RANK = common.Tile(rows=32, cols=128, num_warps=4)
"""Tokens that a program of `rank` places, and those that it compares them with at once: 4096 are 128 programs."""

SUM = common.Tile(rows=8, cols=256, num_warps=4)
"""Tokens whose gradients a program of `sum_rows` reads at once, and columns: most ids occur once or twice in a batch,
and a frequent one should not make its program wait for one row after another."""


def _by_index(run: Launches, kernel: Any, x: Tensor, index: Tensor, y: Tensor) -> None:
    """One row of x or y for each index."""
    rows, width = index.numel(), x.shape[-1]
    if rows * width == 0:
        return
    tile = walk_tile(rows, width)
    blocks = common.cdiv(width, tile.cols)
    run.kernel(
        kernel,
        (common.cdiv(rows, tile.rows) * blocks,),
        x,
        index,
        y,
        x.stride(0),
        y.stride(0),
        rows,
        width,
        blocks,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )


@RULES.kernel("embedding", label="triton gather_rows", strided=True)
def embedding(run: Launches, ins: tuple, outs: tuple, *, padding_idx: int | None) -> None:
    ids, weight = ins
    (y,) = outs
    _by_index(run, kernels.gather_rows, as_rows(weight), ids.view(-1), as_rows(y))


@RULES.kernel("take_rows", label="triton gather_rows", strided=True)
def take_rows(run: Launches, ins: tuple, outs: tuple) -> None:
    x, index = ins
    (y,) = outs
    _by_index(run, kernels.gather_rows, as_rows(x), index.view(-1), as_rows(y))


@RULES.kernel("take_rows_bwd", label="memset + triton scatter_rows")
def take_rows_bwd(run: Launches, ins: tuple, outs: tuple, *, size: int) -> None:
    dy, index = ins
    (dx,) = outs
    run.zero(dx)
    _by_index(run, kernels.scatter_rows, as_rows(dy), index.view(-1), dx)


@RULES.kernel("embedding_bwd", label="memset + triton rank + sum_rows")
def embedding_bwd(run: Launches, ins: tuple, outs: tuple, *, vocab_size: int, padding_idx: int | None) -> None:
    """dy [B, T, D], ids [B, T] -> dweight [V, D], without atomics: the same bits on every run."""
    dy, ids = ins
    (dweight,) = outs
    run.zero(dweight)
    dy, ids = as_rows(dy), ids.view(-1)
    tokens, width = dy.shape
    if dy.numel() == 0:
        return
    order, id_at = (run.scratch((tokens,), torch.int32) for _ in range(2))
    run.kernel(
        kernels.rank,
        (common.cdiv(tokens, RANK.rows),),
        ids,
        order,
        id_at,
        tokens,
        TOKENS=RANK.rows,
        OTHERS=RANK.cols,
        **RANK.options,
    )
    blocks = common.cdiv(width, SUM.cols)
    run.kernel(
        kernels.sum_rows,
        (tokens * blocks,),
        dy,
        order,
        id_at,
        dweight,
        dy.stride(0),
        tokens,
        width,
        blocks,
        NO_PADDING if padding_idx is None else padding_idx,
        TOKENS=SUM.rows,
        COLS=SUM.cols,
        **SUM.options,
    )
