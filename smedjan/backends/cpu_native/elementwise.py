"""Sums, products and casts of plans: aten's, into the array that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cpu_native.table import PLANNED
from smedjan.backends.planned.launch import Launches
from smedjan.graph.node import Node


def same_place(node: Node) -> tuple[tuple[int, int], ...]:
    """The result over any input of its shape and dtype: each value is read where it is written."""
    (out,) = node.outputs
    return tuple((0, i) for i, t in enumerate(node.inputs) if t is not None and t.spec == out.spec)


def _alike(node: Node) -> bool:
    return len({t.dtype for t in (*node.inputs, *node.outputs) if t is not None}) == 1


def _binary(op_name: str, function: Callable[..., Tensor]) -> None:
    def bind(run: Launches, ins: tuple, outs: tuple) -> None:
        run.library(f"aten {op_name}", function, *ins, out=outs[0])

    PLANNED.kernel(op_name, label=f"aten {op_name}", inplace=same_place, strided=True, supports=_alike)(bind)


def _unary(op_name: str, function: Callable[..., Tensor], attribute: str) -> None:
    def bind(run: Launches, ins: tuple, outs: tuple, **attrs: Any) -> None:
        run.library(f"aten {op_name}", function, ins[0], attrs[attribute], out=outs[0])

    PLANNED.kernel(op_name, label=f"aten {op_name}", inplace=same_place, strided=True, supports=_alike)(bind)


_binary("add", torch.add)
_binary("sub", torch.sub)
_binary("mul", torch.mul)
_unary("scale", torch.mul, "factor")
_unary("divide", torch.div, "divisor")
_unary("add_scalar", torch.add, "value")


@PLANNED.kernel("_cast", label="aten copy", strided=True)
def cast(run: Launches, ins: tuple, outs: tuple, *, dtype: str) -> None:
    run.library("aten copy", Tensor.copy_, outs[0], ins[0])


@PLANNED.kernel("zeros_like", label="aten zero")
def zeros_like(run: Launches, ins: tuple, outs: tuple) -> None:
    run.library("aten zero", Tensor.zero_, outs[0])


@PLANNED.kernel("concat", label="aten copy", strided=True)
def concat(run: Launches, ins: tuple, outs: tuple, *, dim: int) -> None:
    """One copy a part; a plan leaves out those that were made in their place."""
    start = 0
    for part in ins:
        run.library("aten copy", Tensor.copy_, outs[0].narrow(dim, start, part.shape[dim]), part)
        start += part.shape[dim]


@PLANNED.kernel("accumulate", label="aten add")
def accumulate(run: Launches, ins: tuple, outs: tuple) -> None:
    total, grad = ins
    run.library("aten add", Tensor.add_, total, grad)
