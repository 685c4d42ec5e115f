"""Elementwise ops, casts, copies and sums over broadcast dims on Triton: rules over `kernels/elementwise.py`."""

from __future__ import annotations

from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import elementwise as kernels
from smedjan.backends.cuda_triton.layout import MAX_SPLITS, Dims, collapse, padded, sum_share, sum_tile, walk
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.graph.node import Node

MAX_POWER = 8
"""Largest exponent, of either sign, that is a product."""


def same_place(node: Node) -> tuple[tuple[int, int], ...]:
    """The result over any input of its shape and dtype: each value is read where it is written."""
    (out,) = node.outputs
    return tuple((0, i) for i, t in enumerate(node.inputs) if t is not None and t.spec == out.spec)


def unary(run: Launches, x: Tensor, y: Tensor, op: str, *, number: float = 0.0, power: int = 0) -> None:
    """y = op(x), x broadcast to y's shape."""
    if y.numel() == 0:
        return
    grid, places, constants = walk(y, x).launch()
    run.kernel(kernels.unary, grid, x, y, float(number), *places, OP=op, POWER=power, **constants)


def binary(run: Launches, a: Tensor, b: Tensor, y: Tensor, op: str) -> None:
    """y = op(a, b), both broadcast to y's shape."""
    if y.numel() == 0:
        return
    grid, places, constants = walk(y, a, b).launch()
    run.kernel(kernels.binary, grid, a, b, y, *places, OP=op, **constants)


def copy_to(run: Launches, source: Tensor, out: Tensor) -> None:
    """out = source, broadcast, whatever the strides: the driver's copy where both are contiguous, else a kernel."""
    assert source.dtype == out.dtype, f"a copy of {source.dtype} to {out.dtype}"
    if source.shape == out.shape and source.is_contiguous() and out.is_contiguous():
        if out.numel():
            run.copy(source, out)
    else:
        unary(run, source, out, "copy")


RULES.copy = copy_to


@RULES.kernel("ones", label="triton fill")
def ones(run: Launches, ins: tuple, outs: tuple, *, dtype: str) -> None:
    (y,) = outs
    tile = common.Tile(rows=1, cols=1, num_warps=1)
    run.kernel(kernels.fill, (1,), y, 1.0, 1, COLS=tile.cols, **tile.options)


@RULES.kernel("copy", label="memcpy, triton copy of strided arrays", strided=True)
def copy(run: Launches, ins: tuple, outs: tuple) -> None:
    (x,), (y,) = ins, outs
    copy_to(run, x, y)


def _binary(op_name: str, op: str) -> None:
    def bind(run: Launches, ins: tuple, outs: tuple) -> None:
        (a, b), (y,) = ins, outs
        binary(run, a, b, y, op)

    RULES.kernel(op_name, label=f"triton {op_name}", inplace=same_place, strided=True)(bind)


_binary("add", "add")
_binary("sub", "sub")
_binary("mul", "mul")
_binary("div", "div")
_binary("scale_by", "mul")
_binary("divide_by", "div")
_binary("rsqrt_bwd", "rsqrt_bwd")


def _unary(op_name: str, op: str, attribute: str | None = None) -> None:
    def bind(run: Launches, ins: tuple, outs: tuple, **attrs: Any) -> None:
        (x,), (y,) = ins, outs
        unary(run, x, y, op, number=0.0 if attribute is None else attrs[attribute])

    RULES.kernel(op_name, label=f"triton {op_name}", inplace=same_place, strided=True)(bind)


_unary("scale", "scale", "factor")
_unary("divide", "divide", "divisor")
_unary("add_scalar", "add_scalar", "value")
_unary("rsqrt", "rsqrt")
_unary("sign", "sign")


@RULES.kernel("clamp", label="triton clamp", inplace=same_place, strided=True)
def clamp(run: Launches, ins: tuple, outs: tuple, *, low: float, high: float) -> None:
    """Two launches where both ends are finite."""
    (x,), (y,) = ins, outs
    ends = [(op, number) for op, number in (("at_least", low), ("at_most", high)) if isfinite(number)]
    for op, number in ends or [("copy", 0.0)]:
        unary(run, x, y, op, number=number)
        x = y


@RULES.kernel("_cast", label="triton cast", strided=True)
def cast(run: Launches, ins: tuple, outs: tuple, *, dtype: str) -> None:
    (x,), (y,) = ins, outs
    unary(run, x, y, "cast")


@RULES.kernel("square", label="triton square", inplace=same_place, strided=True)
def square(run: Launches, ins: tuple, outs: tuple) -> None:
    (x,), (y,) = ins, outs
    unary(run, x, y, "power", power=2)


def _is_product(node: Node) -> bool:
    exponent = node.attrs["exponent"]
    return exponent == int(exponent) and abs(exponent) <= MAX_POWER


@RULES.kernel("power", label="triton power", inplace=same_place, strided=True, supports=_is_product)
def power(run: Launches, ins: tuple, outs: tuple, *, exponent: float) -> None:
    (x,), (y,) = ins, outs
    unary(run, x, y, "power", power=int(exponent))


def sum_dims(run: Launches, x: Tensor, dims: tuple[int, ...], out: Tensor) -> None:
    """out = x summed over `dims`, float32 inside, always in the same order; out is contiguous, in x's order of dims.

    Where few programs would have much to sum, the sum is split and the partial sums are summed by a second launch.
    """
    assert out.is_contiguous(), f"sums at strides {out.stride()}"
    if out.numel() == 0:
        return
    if x.numel() == 0:
        run.zero(out)
        return
    rest = [dim for dim in range(x.ndim) if dim not in dims]
    shape = [x.shape[dim] for dim in rest]
    # The order of what is kept is out's; of what is summed, memory's.
    kept = collapse(shape, ([x.stride(dim) for dim in rest], _contiguous(shape)), by=1)
    reduced = collapse([x.shape[dim] for dim in dims], ([x.stride(dim) for dim in dims],))
    count = prod(size for size, _ in reduced)
    along_rows = bool(reduced) and reduced[-1][1][0] == 1
    tile = sum_tile(out.numel(), count, along_rows=along_rows)
    share = sum_share(out.numel(), count, tile)
    splits = common.cdiv(common.cdiv(count, tile.rows), share)
    if splits == 1:
        _sums(run, x, kept, reduced, out, tile, share)
        return
    partial = run.scratch((splits, out.numel()), torch.float32)
    _sums(run, x, kept, reduced, partial, tile, share)
    tile = sum_tile(out.numel(), splits, along_rows=False)
    _sums(run, partial, [(out.numel(), (1, 1))], [(splits, (out.numel(),))], out, tile, MAX_SPLITS)


def _contiguous(shape: list[int]) -> list[int]:
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def _sums(run: Launches, x: Tensor, kept: Dims, reduced: Dims, out: Tensor, tile: common.Tile, share: int) -> None:
    """`sum_over` with the strides that x, the first operand, has along the kept and the reduced dims."""
    kept_sizes, kept_steps = padded(kept)
    sizes, steps = padded(reduced)
    count, total = prod(kept_sizes), prod(sizes)
    run.kernel(
        kernels.sum_over,
        (common.cdiv(count, tile.cols), common.cdiv(common.cdiv(total, tile.rows), share)),
        x,
        out,
        *kept_steps[0],
        *steps[0],
        *kept_sizes[1:],
        *sizes[1:],
        count,
        total,
        share,
        KEPT_DIMS=max(len(kept), 1),
        DIMS=max(len(reduced), 1),
        KEPT=tile.cols,
        REDUCED=tile.rows,
        **tile.options,
    )


@RULES.kernel("sum_to", label="triton sum_over")
def sum_to(run: Launches, ins: tuple, outs: tuple, *, shape: tuple[int, ...]) -> None:
    (x,), (y,) = ins, outs
    lead = x.ndim - len(shape)
    widened = (dim for dim in range(lead, x.ndim) if shape[dim - lead] == 1 and x.shape[dim] != 1)
    sum_dims(run, x, (*range(lead), *widened), y)


@RULES.kernel("bias_grad", label="triton sum_over")
def bias_grad(run: Launches, ins: tuple, outs: tuple) -> None:
    """The sum that undoes a bias's broadcast."""
    (dy,), (db,) = ins, outs
    sum_dims(run, dy, tuple(range(dy.ndim - 1)), db)
