"""Matrix products of plans over rows as they lie and weights that are stacked in memory; who makes them: products.py.

Products of bfloat16 are summed in float32 and rounded once; a waiting cotangent or a total is added before that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from smedjan.backends.cpu_native.products import ADDMM, ATEN, MAKERS, MM, Maker, Product, floats, of_weights
from smedjan.backends.cpu_native.table import PLANNED
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows
from smedjan.backends.planned.table import Bind
from smedjan.graph.lowering import Supports
from smedjan.graph.node import Node
from smedjan.ops.linear import members

Weights = Callable[[Node], tuple]
"""The weights [N, K] of a node, or their gradients, which are stacked where there are several."""


def _kernel(
    op_name: str, *, label: str, weights: Weights, rows: int = 0, supports: Supports | None = None, **options: Any
) -> Callable[[Bind], Bind]:
    """A rule of `label` for aten's products, and one for each other maker's. `rows` is an input that has them."""
    stacked = ", stacked" if label.endswith(", stacked") else ""

    def taken(node: Node, maker: Maker) -> bool:
        if supports is not None and not supports(node):
            return False
        sizes = of_weights(node.inputs[rows], weights(node), together=True)
        return maker.takes(floats((*node.inputs, *node.outputs)), sizes)

    def register(bind: Bind) -> Bind:
        for maker in MAKERS:
            made = partial(bind, product=maker.product)
            name = label if maker is ATEN else maker.label + stacked
            PLANNED.kernel(op_name, label=name, supports=partial(taken, maker=maker), **options)(made)
        return bind

    return register


def _after(first: int, count: int | None = None) -> Weights:
    return lambda node: node.inputs[first : None if count is None else first + count]


def _of_group(node: Node) -> tuple:
    return members(node.inputs[1:], node.attrs["biased"])[0]  # type: ignore[arg-type]


def _results(node: Node) -> tuple:
    return node.outputs


@_kernel("linear", label=MM, weights=_after(1, 1), supports=lambda node: node.inputs[2] is None)
@_kernel("linear", label=ADDMM, weights=_after(1, 1), supports=lambda node: node.inputs[2] is not None)
def linear(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    x, weight, bias = ins
    product(run, as_rows(x), weight.t(), as_rows(outs[0]), plus=bias)


@_kernel("linear_dx", label=MM, weights=_after(1, 1))
def linear_dx(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    dy, weight = ins
    product(run, as_rows(dy), weight, as_rows(outs[0]))


@_kernel("linear_dx_add", label=ADDMM, weights=_after(2, 1), inplace=((0, 0),))
def linear_dx_add(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    acc, dy, weight = ins
    product(run, as_rows(dy), weight, as_rows(outs[0]), plus=as_rows(acc))


@_kernel("linear_dw", label=MM, weights=_results)
def linear_dw(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    dy, x = ins
    product(run, as_rows(dy).t(), as_rows(x), outs[0])


@_kernel("linear_dw_add", label=ADDMM, weights=_results, rows=1)
def linear_dw_add(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    total, dy, x = ins
    product(run, as_rows(dy).t(), as_rows(x), outs[0], plus=total)


@_kernel("linear_group", label=f"{MM}, stacked", weights=_of_group, supports=lambda node: not node.attrs["biased"])
@_kernel("linear_group", label=f"{ADDMM}, stacked", weights=_of_group, supports=lambda node: node.attrs["biased"])
def linear_group(run: Launches, ins: tuple, outs: tuple, *, product: Product, biased: bool) -> None:
    x, *tensors = ins
    count = len(tensors) // 2 if biased else len(tensors)
    bias = run.stacked(tensors[count:]) if biased else None
    product(run, as_rows(x), run.stacked(tensors[:count]).t(), as_rows(outs[0]), plus=bias)


@_kernel("linear_group_dx", label=f"{MM}, stacked", weights=_after(2), inplace=((0, 1),))
def linear_group_dx(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    dy, acc, *weights = ins
    plus = None if acc is None else as_rows(acc)
    product(run, as_rows(dy), run.stacked(weights), as_rows(outs[0]), plus=plus)


@_kernel("linear_group_dw", label=f"{MM}, stacked", weights=_results)
def linear_group_dw(run: Launches, ins: tuple, outs: tuple, *, product: Product, sizes: tuple[int, ...]) -> None:
    dy, x = ins
    dy, x = as_rows(dy), as_rows(x)
    with run.stacked_results(outs, [(size, x.shape[1]) for size in sizes]) as dw:
        product(run, dy.t(), x, dw)


@_kernel(
    "linear_group_dw_add",
    label=f"{ADDMM}, stacked",
    weights=_results,
    donates=lambda node: tuple((index, index + 2) for index in range(len(node.outputs))),
)
def linear_group_dw_add(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    dy, x, *_ = ins
    total = run.stacked(outs)
    product(run, as_rows(dy).t(), as_rows(x), total, plus=total)


@_kernel("conv1d", label=ADDMM, weights=_after(1, 1))
def conv1d(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    x, weight, bias = ins
    product(run, as_rows(x), weight, as_rows(outs[0]), plus=bias)


@_kernel("conv1d_dx", label=MM, weights=_after(1, 1))
def conv1d_dx(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    dy, weight = ins
    product(run, as_rows(dy), weight.t(), as_rows(outs[0]))


@_kernel("conv1d_dw", label=MM, weights=_results)
def conv1d_dw(run: Launches, ins: tuple, outs: tuple, *, product: Product) -> None:
    dy, x = ins
    product(run, as_rows(x).t(), as_rows(dy), outs[0])
