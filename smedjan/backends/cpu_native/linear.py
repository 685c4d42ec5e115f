"""Matrix products of plans: MKL's or oneDNN's, over rows as they lie and weights that are stacked in memory; on AMX our
own of bfloat16 (`amx.py`).

Products of bfloat16 are summed in float32 and rounded once; a waiting cotangent or a total is added before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cpu_native import amx
from smedjan.backends.cpu_native.table import PLANNED
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows
from smedjan.backends.planned.table import Bind
from smedjan.graph.lowering import Supports

MM, ADDMM = "aten mm", "aten addmm"


def product(run: Launches, a: Tensor, b: Tensor, out: Tensor, *, plus: Tensor | None = None) -> None:
    """out = a b (+ plus: a row for all, or an array of out's shape)       a [M, K], b [K, N] -> out [M, N]"""
    if amx.takes(a, b, out):
        amx.product(run, a, b, out, plus=plus)
    elif plus is None:
        run.library(MM, torch.mm, a, b, out=out)
    else:
        run.library(ADDMM, torch.addmm, plus, a, b, out=out)


def scaled(run: Launches, a: Tensor, b: Tensor, out: Tensor, factor: float, *, add: bool) -> None:
    """out = factor a b, or out += factor a b"""
    run.library(ADDMM, torch.addmm, out, a, b, beta=1 if add else 0, alpha=factor, out=out)


def _kernel(op_name: str, *, label: str, supports: Supports | None = None, **options: Any) -> Callable[[Bind], Bind]:
    """A rule of `label`, and the same one of bfloat16 on AMX, which `product` takes there."""
    stacked = ", stacked" if label.endswith(", stacked") else ""

    def on_amx(node: Any) -> bool:
        return amx.multiplied(node) and (supports is None or supports(node))

    def register(bind: Bind) -> Bind:
        PLANNED.kernel(op_name, label=label, supports=supports, **options)(bind)
        PLANNED.kernel(op_name, label=amx.LABEL + stacked, supports=on_amx, **options)(bind)
        return bind

    return register


@_kernel("linear", label=MM, supports=lambda node: node.inputs[2] is None)
@_kernel("linear", label=ADDMM, supports=lambda node: node.inputs[2] is not None)
def linear(run: Launches, ins: tuple, outs: tuple) -> None:
    x, weight, bias = ins
    product(run, as_rows(x), weight.t(), as_rows(outs[0]), plus=bias)


@_kernel("linear_dx", label=MM)
def linear_dx(run: Launches, ins: tuple, outs: tuple) -> None:
    dy, weight = ins
    product(run, as_rows(dy), weight, as_rows(outs[0]))


@_kernel("linear_dx_add", label=ADDMM, inplace=((0, 0),))
def linear_dx_add(run: Launches, ins: tuple, outs: tuple) -> None:
    acc, dy, weight = ins
    product(run, as_rows(dy), weight, as_rows(outs[0]), plus=as_rows(acc))


@_kernel("linear_dw", label=MM)
def linear_dw(run: Launches, ins: tuple, outs: tuple) -> None:
    dy, x = ins
    product(run, as_rows(dy).t(), as_rows(x), outs[0])


@_kernel("linear_dw_add", label=ADDMM)
def linear_dw_add(run: Launches, ins: tuple, outs: tuple) -> None:
    total, dy, x = ins
    product(run, as_rows(dy).t(), as_rows(x), outs[0], plus=total)


@_kernel("linear_group", label=f"{MM}, stacked", supports=lambda node: not node.attrs["biased"])
@_kernel("linear_group", label=f"{ADDMM}, stacked", supports=lambda node: node.attrs["biased"])
def linear_group(run: Launches, ins: tuple, outs: tuple, *, biased: bool) -> None:
    x, *tensors = ins
    count = len(tensors) // 2 if biased else len(tensors)
    bias = run.stacked(tensors[count:]) if biased else None
    product(run, as_rows(x), run.stacked(tensors[:count]).t(), as_rows(outs[0]), plus=bias)


@_kernel("linear_group_dx", label=f"{MM}, stacked", inplace=((0, 1),))
def linear_group_dx(run: Launches, ins: tuple, outs: tuple) -> None:
    dy, acc, *weights = ins
    plus = None if acc is None else as_rows(acc)
    product(run, as_rows(dy), run.stacked(weights), as_rows(outs[0]), plus=plus)


@_kernel("linear_group_dw", label=f"{MM}, stacked")
def linear_group_dw(run: Launches, ins: tuple, outs: tuple, *, sizes: tuple[int, ...]) -> None:
    dy, x = ins
    dy, x = as_rows(dy), as_rows(x)
    with run.stacked_results(outs, [(size, x.shape[1]) for size in sizes]) as dw:
        product(run, dy.t(), x, dw)


@_kernel(
    "linear_group_dw_add",
    label=f"{ADDMM}, stacked",
    donates=lambda node: tuple((index, index + 2) for index in range(len(node.outputs))),
)
def linear_group_dw_add(run: Launches, ins: tuple, outs: tuple) -> None:
    dy, x, *_ = ins
    total = run.stacked(outs)
    product(run, as_rows(dy).t(), as_rows(x), total, plus=total)


@_kernel("conv1d", label=ADDMM)
def conv1d(run: Launches, ins: tuple, outs: tuple) -> None:
    x, weight, bias = ins
    product(run, as_rows(x), weight, as_rows(outs[0]), plus=bias)


@_kernel("conv1d_dx", label=MM)
def conv1d_dx(run: Launches, ins: tuple, outs: tuple) -> None:
    dy, weight = ins
    product(run, as_rows(dy), weight.t(), as_rows(outs[0]))


@_kernel("conv1d_dw", label=MM)
def conv1d_dw(run: Launches, ins: tuple, outs: tuple) -> None:
    dy, x = ins
    product(run, as_rows(x).t(), as_rows(dy), outs[0])
