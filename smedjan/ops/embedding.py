"""Rows picked by index: the token embedding, and the trained rows of the last hidden states."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor


@op
def embedding(input_ids: Tensor, weight: Tensor, *, padding_idx: int | None = None) -> Spec:
    """y = weight[input_ids]       input_ids [B, T], weight [V, D] -> y [B, T, D]

    `padding_idx` changes the backward alone: the gradient of that row is zero, as torch.nn.Embedding has it.
    """
    require(weight.ndim == 2, f"embedding: weight {weight.shape}")
    return weight.like(shape=(*input_ids.shape, weight.shape[1]))


@embedding.vjp
def _(dys, ins, outs, needs, acc, *, padding_idx):
    return (None, embedding_bwd(dys[0], ins[0], vocab_size=ins[1].shape[0], padding_idx=padding_idx))


@op
def embedding_bwd(dy: Tensor, input_ids: Tensor, *, vocab_size: int, padding_idx: int | None) -> Spec:
    """dweight[v] = sum of dy where input_ids == v; zero at padding_idx       dy [B, T, D] -> dweight [V, D]"""
    return dy.like(shape=(vocab_size, dy.shape[-1]))


@op
def take_rows(x: Tensor, rows: Tensor) -> Spec:
    """y = x[rows]       x [N, D], rows [R] (each at most once) -> y [R, D]"""
    require(x.ndim == 2 and rows.ndim == 1, f"take_rows: x {x.shape}, rows {rows.shape}")
    return x.like(shape=(rows.shape[0], x.shape[1]))


@take_rows.vjp
def _(dys, ins, outs, needs, acc):
    return (take_rows_bwd(dys[0], ins[1], size=ins[0].shape[0]), None)


@op
def take_rows_bwd(dy: Tensor, rows: Tensor, *, size: int) -> Spec:
    """dx[rows] = dy, zero elsewhere       dy [R, D], rows [R] -> dx [size, D]"""
    return dy.like(shape=(size, dy.shape[1]))
