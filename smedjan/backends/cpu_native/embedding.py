"""The embedding, rows by index, and their gradients, into the array that is given."""

from __future__ import annotations

import torch
from torch import Tensor

from smedjan.backends.cpu_native.table import PLANNED
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows


def _gather(run: Launches, x: Tensor, index: Tensor, y: Tensor) -> None:
    run.library("aten index_select", torch.index_select, as_rows(x), 0, index.view(-1), out=as_rows(y))


@PLANNED.kernel("embedding", label="aten index_select")
def embedding(run: Launches, ins: tuple, outs: tuple, *, padding_idx: int | None) -> None:
    ids, weight = ins
    _gather(run, weight, ids, outs[0])


@PLANNED.kernel("take_rows", label="aten index_select")
def take_rows(run: Launches, ins: tuple, outs: tuple) -> None:
    x, index = ins
    _gather(run, x, index, outs[0])


@PLANNED.kernel("take_rows_bwd", label="aten zero + index_copy")
def take_rows_bwd(run: Launches, ins: tuple, outs: tuple, *, size: int) -> None:
    """No row is taken twice: the others' gradient is zero."""
    dy, index = ins
    run.library("aten zero", Tensor.zero_, outs[0])
    run.library("aten index_copy", Tensor.index_copy_, outs[0], 0, index.view(-1), as_rows(dy))


@PLANNED.kernel("embedding_bwd", label="aten zero + index_add", supports=lambda node: node.inputs[0].dtype == "float32")
def embedding_bwd(run: Launches, ins: tuple, outs: tuple, *, vocab_size: int, padding_idx: int | None) -> None:
    """dweight[ids[i]] += dy[i], in the tokens' order; the row of padding_idx has none."""
    dy, ids = ins
    run.library("aten zero", Tensor.zero_, outs[0])
    run.library("aten index_add", Tensor.index_add_, outs[0], 0, ids.view(-1), as_rows(dy))
    if padding_idx is not None:
        run.library("aten zero", Tensor.zero_, outs[0][padding_idx])
