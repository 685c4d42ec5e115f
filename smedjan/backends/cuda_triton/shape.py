"""Parts of a tensor and moves of heads on Triton: views, and the copies that cannot be one."""

from __future__ import annotations

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.elementwise import copy_to, sum_dims
from smedjan.backends.cuda_triton.kernels import shape as kernels
from smedjan.backends.cuda_triton.launch import Launches
from smedjan.backends.cuda_triton.layout import Walk, collapse, padded
from smedjan.backends.cuda_triton.table import RULES
from smedjan.graph.node import Node


@RULES.view("slice_last")
def slice_last(x: Tensor, *, start: int, stop: int) -> Tensor:
    return x[..., start:stop]


@RULES.view("narrow")
def narrow(x: Tensor, *, dim: int, start: int, size: int) -> Tensor:
    return x.narrow(dim, start, size)


@RULES.view("split")
def split(x: Tensor, *, sizes: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    return torch.split(x, list(sizes), dim)


@RULES.view("contiguous", inverse=lambda y, node: y)
def contiguous(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise RuntimeError(f"strides {x.stride()} are not those of {list(x.shape)} in C order")
    return x


@RULES.kernel("zeros_like", label="memset")
def zeros_like(run: Launches, ins: tuple, outs: tuple) -> None:
    run.zero(*outs)


@RULES.kernel("concat", label="memcpy, triton copy of strided parts", strided=True)
def concat(run: Launches, ins: tuple, outs: tuple, *, dim: int) -> None:
    """One copy a part."""
    (y,) = outs
    start = 0
    for part in ins:
        copy_to(run, part, y.narrow(dim, start, part.shape[dim]))
        start += part.shape[dim]


@RULES.kernel("slice_last_bwd", label="triton pad_last", strided=True)
def slice_last_bwd(run: Launches, ins: tuple, outs: tuple, *, size: int, start: int) -> None:
    (dy,), (dx,) = ins, outs
    if dx.numel() == 0:
        return
    steps = [tensor.stride() for tensor in (dy, dx)]
    dims = collapse(dx.shape[:-1], [each[:-1] for each in steps], by=1) or [(1, (0, 0))]
    sizes, strides = padded(dims)
    whole = Walk(
        outer=tuple(sizes),
        strides=tuple((*outer, each[-1]) for outer, each in zip(strides, steps, strict=True)),
        dims=len(dims),
        width=size,
    )
    grid, places, constants = whole.launch()
    run.kernel(kernels.pad_last, grid, dy, dx, start, start + dy.shape[-1], *places, **constants)


def split_heads_in(x: Tensor, *, heads: int) -> Tensor:
    """[B, T, H*D] -> [B, H, T, D]"""
    batch, seq, width = x.shape
    return x.view(batch, seq, heads, width // heads).transpose(1, 2)


def merge_heads_in(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H*D], where memory has the heads inside"""
    batch, heads, seq, dim = x.shape
    return x.transpose(1, 2).view(batch, seq, heads * dim)


def _split(y: Tensor, node: Node) -> Tensor:
    """The place [B, H, T, D] of what is merged into y."""
    (x,) = node.inputs
    assert x is not None
    return split_heads_in(y, heads=x.shape[1])


def _merged(y: Tensor, node: Node) -> Tensor:
    """The place [B, T, H*D] of what is split into y, if heads are inside there."""
    return merge_heads_in(y)


for name in ("split_heads", "merge_heads_bwd"):
    RULES.view(name, inverse=_merged)(split_heads_in)
for name in ("merge_heads", "split_heads_bwd"):
    RULES.view(name, inverse=_split)(merge_heads_in)


@RULES.view("swap_heads", inverse=lambda y, node: y.transpose(1, 2))
def swap_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


@RULES.kernel("repeat_kv", label="triton copy", strided=True)
def repeat_kv(run: Launches, ins: tuple, outs: tuple, *, times: int) -> None:
    """Each of the `times` copies of every head at once."""
    (x,), (y,) = ins, outs
    for place in range(times):
        copy_to(run, x, y[:, place::times])


@RULES.kernel("repeat_kv_bwd", label="triton sum_over")
def repeat_kv_bwd(run: Launches, ins: tuple, outs: tuple, *, times: int) -> None:
    """Batch by batch, so that K, S and D are no more dims than a kernel counts through, whatever their strides."""
    (dy,), (dx,) = ins, outs
    for grad, out in zip(dy, dx, strict=True):
        sum_dims(run, grad.unflatten(0, (-1, times)), (1,), out)
