"""Parts of a tensor, other shapes of it and moves of its heads: views, the same for every planned backend."""

from __future__ import annotations

import torch
from torch import Tensor

from smedjan.backends.planned.table import PlannedRules
from smedjan.graph import tensor
from smedjan.graph.node import Node


def slice_last(x: Tensor, *, start: int, stop: int) -> Tensor:
    return x[..., start:stop]


def narrow(x: Tensor, *, dim: int, start: int, size: int) -> Tensor:
    return x.narrow(dim, start, size)


def split(x: Tensor, *, sizes: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    return torch.split(x, list(sizes), dim)


def contiguous(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise RuntimeError(f"strides {x.stride()} are not those of {list(x.shape)} in C order")
    return x


def identity(x: Tensor) -> Tensor:
    return x


def reshape(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return x.view(shape)


def split_heads(x: Tensor, *, heads: int) -> Tensor:
    """[B, T, H*D] -> [B, H, T, D]"""
    batch, seq, width = x.shape
    return x.view(batch, seq, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H*D], where memory has the heads inside"""
    batch, heads, seq, dim = x.shape
    return x.transpose(1, 2).view(batch, seq, heads * dim)


def swap_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _given(node: Node) -> tensor.Tensor:
    (x,) = node.inputs
    assert x is not None
    return x


def _same(y: Tensor, node: Node) -> Tensor:
    return y


def _reshaped(y: Tensor, node: Node) -> Tensor:
    return y.view(_given(node).shape)


def _split(y: Tensor, node: Node) -> Tensor:
    """The place [B, H, T, D] of what is merged into y."""
    return split_heads(y, heads=_given(node).shape[1])


def _merged(y: Tensor, node: Node) -> Tensor:
    """The place [B, T, H*D] of what is split into y, if heads are inside there."""
    return merge_heads(y)


def _swapped(y: Tensor, node: Node) -> Tensor:
    return y.transpose(1, 2)


def add_views(rules: PlannedRules) -> None:
    rules.view("slice_last")(slice_last)
    rules.view("narrow")(narrow)
    rules.view("split")(split)
    rules.view("contiguous", inverse=_same)(contiguous)
    rules.view("identity", inverse=_same)(identity)
    rules.view("reshape", inverse=_reshaped)(reshape)
    rules.view("swap_heads", inverse=_swapped)(swap_heads)
    for name in ("split_heads", "merge_heads_bwd"):
        rules.view(name, inverse=_merged)(split_heads)
    for name in ("merge_heads", "split_heads_bwd"):
        rules.view(name, inverse=_split)(merge_heads)
