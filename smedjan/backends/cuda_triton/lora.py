"""lora_linear and lora_linear_group: Triton kernels for bfloat16, cuBLAS for float32. Formulas in `kernels/lora.py`.

A group of n layers takes two launches forward (`low`; base and adapters in one product) and four backward (g; all dA,
dB; their sum over splits; dx). x is read twice forward and once backward, dy three times. What single ops write to read
it again (x in float32, the base's and the adapters' products, each sum of dx) is never written. dx takes the place of
the waiting cotangent, or of x, whose last reader is `lora_grads`; g is the node's scratch. float32 has no tensor cores
of its accuracy: there cuBLAS adds product to product (beta = 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from smedjan.backends.cuda_triton import tuned
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import lora as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows
from smedjan.graph.node import Node
from smedjan.ops.lora import group_parts

TRITON, CUBLAS = "triton lora_matmul", "cublas mm + addmm"

MAX_MEMBERS = 4
"""Members that the kernels have arguments for: q, k, v, and one more."""

FEW_ROWS = 1024
"""Up to here, 16 rows a program make the narrow products: of 64, most multiprocessors would have none."""

GRADS_PROGRAMS = 512
"""Programs wanted for the sums over rows, two rounds of an H100: where blocks are fewer, several share the rows."""


def _shape(kernel: str, shape_class: str) -> dict[str, int]:
    """A tuned launch shape, whose entries are all numbers."""
    return cast(dict[str, int], tuned.options(kernel, shape_class))


def _matmul_class(rows: int, depth: int, widths: Sequence[int]) -> str:
    """The class of a product [rows, depth] times [depth, each of widths].

    256 columns a program read the least, but a multiprocessor holds one such program alone, whose end nothing hides:
    for deep products, where no member leaves a part of a program idle and each multiprocessor has two in turn.
    """
    if rows <= 64:
        return "16 rows" if rows <= 16 else "64 rows"
    programs = common.cdiv(rows, 128) * (sum(widths) // 256)
    return "wide" if depth >= 2048 and programs >= 256 and all(width % 256 == 0 for width in widths) else "rows"


def _rank_class(rank: int) -> str:
    """Columns that a program of a narrow product makes."""
    return next((str(size) for size in (16, 32) if rank <= size), "64")


@dataclass(frozen=True, kw_only=True)
class Group:
    """A node's layers. weights [O_i, I]; adapters A_i [r, I] and B_i [O_i, r] of the members that are `adapted`."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    adapted: tuple[bool, ...]
    scaling: float
    together: bool

    @property
    def widths(self) -> list[int]:
        return [weight.shape[0] for weight in self.weights]

    @property
    def columns(self) -> list[tuple[int, int]]:
        """(first, width) of each member in y"""
        return [(end - width, width) for end, width in zip(accumulate(self.widths), self.widths, strict=True)]

    @property
    def adapted_columns(self) -> list[tuple[int, int]]:
        return [columns for columns, has in zip(self.columns, self.adapted, strict=True) if has]

    @property
    def rank(self) -> int:
        return self.a[0].shape[0]

    @property
    def ranks(self) -> int:
        """Rows of all A"""
        return self.rank * len(self.a)


def _padded(values: Sequence[Any]) -> list[Any]:
    """`values` as the kernels' MAX_MEMBERS arguments; those behind the last are not looked at."""
    return [*values] + [values[-1]] * (MAX_MEMBERS - len(values))


def _forward_bfloat16(run: Launches, x: Tensor, group: Group, y: Tensor | None, low: Tensor | None) -> None:
    """Without a reader of y (what is recomputed may have none), low alone."""
    x = as_rows(x)
    low = run.scratch((x.shape[0], group.ranks), torch.float32) if low is None else as_rows(low)
    if x.shape[0] == 0:
        return
    a, b = run.stacked(group.a), run.stacked(group.b)
    rows, depth = x.shape
    _low(run, x, a, low, [(0, depth)], group.ranks, 1.0, transposed=True)
    if y is None:
        return
    y = as_rows(y)
    shape = _shape("lora_matmul", _matmul_class(rows, depth, group.widths))
    blocks = sum(common.cdiv(width, shape["N"]) for width in group.widths)
    run.kernel(
        kernels.lora_matmul,
        (common.cdiv(rows, shape["M"]) * blocks,),
        x,
        *_padded(_rows_of(group.weights)),
        run.stacked(group.biases) if group.biases else None,
        low,
        b,
        y,
        x.stride(0),
        y.stride(0),
        rows,
        depth,
        *_padded(group.widths),
        group.scaling,
        COUNT=len(group.weights),
        ADAPTED=sum(1 << member for member, has in enumerate(group.adapted) if has),
        RANK=group.rank,
        LOW_STRIDE=low.stride(0),
        EVEN=depth % shape["K"] == 0,
        **shape,
    )


def _rows_of(weights: Sequence[Tensor]) -> list[Tensor]:
    for weight in weights:
        assert weight.is_contiguous(), f"a weight of strides {weight.stride()}"
    return list(weights)


def _low(
    run: Launches,
    x: Tensor,
    factor: Tensor,
    low: Tensor,
    columns: Sequence[tuple[int, int]],
    rank: int,
    scale: float,
    *,
    transposed: bool,
) -> None:
    """low = scale x F, of each of `columns` (first, width) of x, F [width, rank] or `transposed`."""
    rows = x.shape[0]
    shape = _shape("lora_low", "few rows" if rows <= FEW_ROWS else _rank_class(rank))
    run.kernel(
        kernels.lora_low,
        (common.cdiv(rows, shape["M"]) * common.cdiv(rank, shape["N"]), len(columns)),
        x,
        factor,
        low,
        x.stride(0),
        rows,
        *_padded([first for first, _ in columns]),
        *_padded([width for _, width in columns]),
        scale,
        COUNT=len(columns),
        RANK=rank,
        LOW_STRIDE=low.stride(0),
        TRANSPOSED=transposed,
        EVEN=all(width % shape["K"] == 0 for _, width in columns),
        **shape,
    )


def _backward_bfloat16(
    run: Launches,
    dy: Tensor,
    x: Tensor,
    low: Tensor,
    acc: Tensor | None,
    group: Group,
    dx: Tensor | None,
    da: Sequence[Tensor | None],
    db: Sequence[Tensor | None],
) -> None:
    """A gradient that is None is not wanted."""
    dy, x, low = as_rows(dy), as_rows(x), as_rows(low)
    b = run.stacked(group.b)
    g = run.scratch((x.shape[0], group.ranks), torch.float32)
    _low(run, dy, b, g, group.adapted_columns, group.rank, group.scaling, transposed=False)
    if any(grad is not None for grad in (*da, *db)):
        _grads(run, dy, x, g, low, group, da, db)
    # Last: x and the waiting cotangent may lie where dx goes.
    if dx is not None:
        _dx(run, dy, g, acc, group, as_rows(dx))


def _grads(
    run: Launches,
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    low: Tensor,
    group: Group,
    da: Sequence[Tensor | None],
    db: Sequence[Tensor | None],
) -> None:
    rows, depth = x.shape
    shape = _shape("lora_grads", _rank_class(group.ranks))
    tile_rows, cols, ranks = shape["M"], shape["N"], shape["R"]
    columns = group.adapted_columns
    sizes = [group.rank * depth] * len(da) + [width * group.rank for _, width in columns]
    total = sum(sizes)
    blocks = common.cdiv(depth, cols) * common.cdiv(group.ranks, ranks)
    blocks += sum(common.cdiv(width, cols) for _, width in columns) * common.cdiv(group.rank, ranks)
    splits = max(min(common.cdiv(GRADS_PROGRAMS, blocks), common.cdiv(rows, 4 * tile_rows)), 1)
    chunk = common.cdiv(common.cdiv(rows, splits), tile_rows) * tile_rows
    partial = run.scratch((splits, total), torch.float32)
    run.kernel(
        kernels.lora_grads,
        (blocks, splits),
        x,
        dy,
        g,
        low,
        partial,
        x.stride(0),
        dy.stride(0),
        rows,
        chunk,
        depth,
        total,
        *_padded([first for first, _ in columns]),
        *_padded([width for _, width in columns]),
        group.scaling,
        COUNT=len(columns),
        RANK=group.rank,
        RANKS=group.ranks,
        LOW_STRIDE=low.stride(0),
        **shape,
    )
    ends = accumulate(sizes)
    # What nobody reads is summed over its own first part.
    outs = [
        partial[0, end - size : end] if out is None else out
        for out, size, end in zip((*da, *db), sizes, ends, strict=True)
    ]
    flat = common.flat_tile()
    run.kernel(
        kernels.lora_sum,
        (sum(common.cdiv(size, flat.cols) for size in sizes),),
        partial,
        *_padded(outs[: len(da)]),
        *_padded(outs[len(da) :]),
        splits,
        total,
        sizes[0],
        *_padded(sizes[len(da) :]),
        COUNT=len(columns),
        COLS=flat.cols,
        **flat.options,
    )


def _dx(run: Launches, dy: Tensor, g: Tensor, acc: Tensor | None, group: Group, dx: Tensor) -> None:
    rows, width = dx.shape
    a = run.stacked(group.a)
    waiting = None if acc is None else as_rows(acc)
    shape = _shape("lora_matmul_dx", _matmul_class(rows, sum(group.widths), [width]))
    run.kernel(
        kernels.lora_matmul_dx,
        (common.cdiv(rows, shape["M"]) * common.cdiv(width, shape["N"]),),
        dy,
        *_padded(_rows_of(group.weights)),
        g,
        a,
        waiting,
        dx,
        dy.stride(0),
        0 if waiting is None else waiting.stride(0),
        dx.stride(0),
        rows,
        width,
        *_padded(group.widths),
        COUNT=len(group.weights),
        RANKS=group.ranks,
        EVEN=all(size % shape["K"] == 0 for size in group.widths),
        **shape,
    )


def _forward_float32(run: Launches, x: Tensor, group: Group, y: Tensor | None, low: Tensor | None) -> None:
    x = as_rows(x)
    low = run.scratch((x.shape[0], group.ranks), torch.float32) if low is None else as_rows(low)
    run.library("cublas mm", torch.mm, x, run.stacked(group.a).t(), out=low)
    if y is None:
        return
    y = as_rows(y)
    for (first, width), weight, bias in _products(run, group):
        out = y[:, first : first + width]
        if bias is None:
            run.library("cublas mm", torch.mm, x, weight.t(), out=out)
        else:
            run.library("cublas addmm", torch.addmm, bias, x, weight.t(), out=out)
    for index, (first, width) in enumerate(group.adapted_columns):
        out, part = y[:, first : first + width], _part(low, index, group.rank)
        run.library("cublas addmm", torch.addmm, out, part, group.b[index].t(), alpha=group.scaling, out=out)


def _products(run: Launches, group: Group) -> list[tuple[tuple[int, int], Tensor, Tensor | None]]:
    """(columns of y, weight, bias) of each base product: one of stacked weights, or a member's."""
    if group.together:
        bias = run.stacked(group.biases) if group.biases else None
        return [((0, sum(group.widths)), run.stacked(group.weights), bias)]
    biases: Sequence[Tensor | None] = group.biases or [None] * len(group.weights)
    return list(zip(group.columns, group.weights, biases, strict=True))


def _part(low: Tensor, index: int, rank: int) -> Tensor:
    return low[:, index * rank : (index + 1) * rank]


def _backward_float32(
    run: Launches,
    dy: Tensor,
    x: Tensor,
    low: Tensor,
    acc: Tensor | None,
    group: Group,
    dx: Tensor | None,
    da: Sequence[Tensor | None],
    db: Sequence[Tensor | None],
) -> None:
    dy, x, low = as_rows(dy), as_rows(x), as_rows(low)
    g = run.scratch((x.shape[0], group.ranks), torch.float32)

    def scaled(a: Tensor, b: Tensor, out: Tensor) -> None:
        run.library("cublas addmm", torch.addmm, out, a, b, beta=0, alpha=group.scaling, out=out)

    for index, (first, width) in enumerate(group.adapted_columns):
        part = dy[:, first : first + width]
        scaled(part, group.b[index], _part(g, index, group.rank))
        grad = da[index]
        if grad is not None:
            run.library("cublas mm", torch.mm, _part(g, index, group.rank).t(), x, out=grad)
        grad = db[index]
        if grad is not None:
            scaled(part.t(), _part(low, index, group.rank), grad)
    # Last: x and the waiting cotangent may lie where dx goes.
    if dx is not None:
        out = as_rows(dx)
        plus = None if acc is None else as_rows(acc)
        for (first, width), weight, _ in _products(run, group):
            part = dy[:, first : first + width]
            if plus is None:
                run.library("cublas mm", torch.mm, part, weight, out=out)
            else:
                run.library("cublas addmm", torch.addmm, plus, part, weight, out=out)
            plus = out
        run.library("cublas addmm", torch.addmm, out, g, run.stacked(group.a), out=out)


def _forward(run: Launches, x: Tensor, group: Group, y: Tensor | None, low: Tensor | None) -> None:
    (_forward_bfloat16 if x.dtype == torch.bfloat16 else _forward_float32)(run, x, group, y, low)


def _backward(run: Launches, dy: Tensor, x: Tensor, *others: Any) -> None:
    (_backward_bfloat16 if x.dtype == torch.bfloat16 else _backward_float32)(run, dy, x, *others)


def _of(dtype: str):
    """Whether x is `dtype`, and the members are no more than the kernels have arguments for."""

    def supports(node: Node) -> bool:
        x = node.inputs[1 if node.op.name.endswith("_bwd") else 0]
        return x is not None and x.dtype == dtype and len(node.attrs.get("adapted", (True,))) <= MAX_MEMBERS

    return supports


def _over(acc: int) -> Callable[[Node], tuple[tuple[int, int], ...]]:
    """dx over the waiting cotangent, or over x"""
    return lambda node: ((0, acc), (0, 1)) if node.attrs["needs"][0] else ()


@RULES.kernel("lora_linear", label=CUBLAS, supports=_of("float32"), strided=True)
@RULES.kernel("lora_linear", label=TRITON, supports=_of("bfloat16"), strided=True)
def lora_linear(run: Launches, ins: tuple, outs: tuple, *, scaling: float) -> None:
    """x [..., I] -> y [..., O], low [..., r]: a group of one"""
    x, weight, bias, a, b = ins
    biases = () if bias is None else (bias,)
    group = Group(weights=(weight,), biases=biases, a=(a,), b=(b,), adapted=(True,), scaling=scaling, together=True)
    _forward(run, x, group, *outs)


@RULES.kernel("lora_linear_bwd", label=CUBLAS, supports=_of("float32"), inplace=_over(6))
@RULES.kernel("lora_linear_bwd", label=TRITON, supports=_of("bfloat16"), inplace=_over(6))
def lora_linear_bwd(run: Launches, ins: tuple, outs: tuple, *, needs: tuple[bool, bool, bool], scaling: float) -> None:
    """dy [..., O], x, low -> those needed of dx [..., I], dA [r, I], dB [O, r]"""
    dy, x, weight, a, b, low, acc = ins
    found = iter(outs)
    dx, da, db = (next(found) if need else None for need in needs)
    group = Group(weights=(weight,), biases=(), a=(a,), b=(b,), adapted=(True,), scaling=scaling, together=True)
    _backward(run, dy, x, low, acc, group, dx, (da,), (db,))


@RULES.kernel("lora_linear_group", label=CUBLAS, supports=_of("float32"), strided=True)
@RULES.kernel("lora_linear_group", label=TRITON, supports=_of("bfloat16"), strided=True)
def lora_linear_group(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    adapted: tuple[bool, ...],
    biased: bool,
    scaling: float,
    together: bool,
) -> None:
    """x [..., I] -> y [..., sum of O_i], low [..., r * adapters]"""
    x, *tensors = ins
    weights, biases, a, b = group_parts(tensors, adapted, biased)
    group = Group(weights=weights, biases=biases, a=a, b=b, adapted=adapted, scaling=scaling, together=together)
    _forward(run, x, group, *outs)


@RULES.kernel("lora_linear_group_bwd", label=CUBLAS, supports=_of("float32"), inplace=_over(3))
@RULES.kernel("lora_linear_group_bwd", label=TRITON, supports=_of("bfloat16"), inplace=_over(3))
def lora_linear_group_bwd(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    adapted: tuple[bool, ...],
    needs: tuple[bool, bool],
    scaling: float,
    together: bool,
) -> None:
    """dy [..., sum of O_i], x, low -> those needed of dx [..., I]; all dA_i [r, I], then all dB_i [O_i, r]"""
    dy, x, low, acc, *tensors = ins
    weights, _, a, b = group_parts(tensors, adapted, False)
    group = Group(weights=weights, biases=(), a=a, b=b, adapted=adapted, scaling=scaling, together=together)
    dx, grads = (outs[0], outs[1:]) if needs[0] else (None, outs)
    grads = grads if needs[1] else (None,) * (2 * len(a))
    _backward(run, dy, x, low, acc, group, dx, grads[: len(a)], grads[len(a) :])
