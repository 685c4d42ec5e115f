"""The adapter's products added into the base's as they are made: no scaled copy and no sum of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cpu_native.narrow import Aten, Narrow, Native
from smedjan.backends.cpu_native.products import MAKERS, Maker, Product, of_weights
from smedjan.backends.cpu_native.table import PLANNED, RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows
from smedjan.backends.planned.table import Bind
from smedjan.graph.node import Node
from smedjan.graph.tensor import Tensor as Described
from smedjan.ops.lora import group_parts

LABEL = "cpu_native fused lora_linear"


def _float32(node) -> bool:
    """Other dtypes run decomposed: the sum of both products is rounded once, and BLAS would round each."""
    return all(t is None or t.dtype == "float32" for t in node.inputs)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


@RULES.rule("lora_linear", label=LABEL, supports=_float32)
def lora_linear(x, weight, bias, a, b, *, scaling):
    flat = _rows(x)
    low = flat @ a.t()
    y = torch.nn.functional.linear(flat, weight, bias).addmm_(low, b.t(), alpha=scaling)
    return y.view(*x.shape[:-1], -1), low.view(*x.shape[:-1], -1)


@RULES.rule("lora_linear_bwd", label=LABEL, supports=_float32)
def lora_linear_bwd(dy, x, weight, a, b, low, acc, *, needs, scaling):
    flat = _rows(dy)
    g = (flat @ b).mul_(scaling)
    made = []
    if needs[0]:
        dx = flat @ weight if acc is None else torch.addmm(_rows(acc), flat, weight)
        made.append(dx.addmm_(g, a).view(x.shape))
    if needs[1]:
        made.append(g.t() @ _rows(x))
    if needs[2]:
        made.append((flat.t() @ _rows(low)).mul_(scaling))
    return made[0] if len(made) == 1 else tuple(made)


# Of plans: layers of one input as one product with their stacked weights, their A as another one; each B adds its part.


def columns(weights: Sequence[Tensor]) -> list[slice]:
    """Where each member lies in y."""
    ends = list(accumulate(weight.shape[0] for weight in weights))
    return [slice(end - weight.shape[0], end) for end, weight in zip(ends, weights, strict=True)]


def adapted_columns(weights: Sequence[Tensor], adapted: tuple[bool, ...]) -> list[slice]:
    return [own for own, has in zip(columns(weights), adapted, strict=True) if has]


Base = Callable[[Tensor, Tensor], None]
"""base(x, y), rows of both: writes down how y = x W^T + bias is made."""


def forward(
    run: Launches,
    x: Tensor,
    base: Base,
    columns: Sequence[slice],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    outs: tuple,
    *,
    narrow: type[Narrow],
    scaling: float,
) -> None:
    """`columns` of y are those of the members with an adapter. Beside bfloat16 weights, the base's product is rounded,
    as PEFT's is, then the sum."""
    y, low = outs
    x = as_rows(x)
    rank, rows = a[0].shape[0], x.shape[0]
    low = run.scratch((rows, rank * len(a)), torch.float32) if low is None else as_rows(low)
    narrow.reduce(run, [(narrow.wide(run, x), run.stacked(a).t(), low, 1.0)])
    if y is None:
        return
    y = as_rows(y)
    base(x, y)
    parts = low.split(rank, 1)
    products = [(part, expand.t(), y[:, own], scaling) for part, own, expand in zip(parts, columns, b, strict=True)]
    narrow.expand(run, products)


def _products(
    run: Launches, weights: Sequence[Tensor], biases: Sequence[Tensor], *, product: Product, together: bool
) -> Base:
    def base(x: Tensor, y: Tensor) -> None:
        if together:
            bias = run.stacked(biases) if biases else None
            product(run, x, run.stacked(weights).t(), y, plus=bias)
            return
        for index, (own, weight) in enumerate(zip(columns(weights), weights, strict=True)):
            product(run, x, weight.t(), y[:, own], plus=biases[index] if biases else None)

    return base


def _backward(
    run: Launches,
    dy: Tensor,
    x: Tensor,
    low: Tensor,
    acc: Tensor | None,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    outs: tuple,
    *,
    product: Product,
    narrow: type[Narrow],
    adapted: tuple[bool, ...],
    needs: tuple[bool, bool],
    scaling: float,
    together: bool,
) -> None:
    dy, x, low = as_rows(dy), as_rows(x), as_rows(low)
    rank, rows = a[0].shape[0], dy.shape[0]
    dx = outs[0] if needs[0] else None
    grads = outs[1:] if needs[0] else outs
    wide, with_adapter = narrow.wide(run, dy), adapted_columns(weights, adapted)
    g = run.scratch((rows, rank * len(a)), torch.float32)
    parts = zip(with_adapter, b, g.split(rank, 1), strict=True)
    narrow.reduce(run, [(wide[:, own], expand, part, scaling) for own, expand, part in parts])
    if needs[1]:
        das, dbs = grads[: len(a)], grads[len(a) :]
        members = zip(low.split(rank, 1), with_adapter, dbs, strict=True)
        products = [(part, wide[:, own], db.t(), scaling) for part, own, db in members if db is not None]
        if any(da is not None for da in das):
            with run.stacked_results(das, [tuple(each.shape) for each in a]) as da:
                narrow.outer(run, [(g, narrow.wide(run, x), da, 1.0), *products])
        else:
            narrow.outer(run, products)
    if dx is None:
        return
    dx = as_rows(dx)
    plus = None if acc is None else as_rows(acc)
    if together:
        product(run, dy, run.stacked(weights), dx, plus=plus)
    else:
        for own, weight in zip(columns(weights), weights, strict=True):
            product(run, dy[:, own], weight, dx, plus=plus)
            plus = dx
    narrow.expand(run, [(g, run.stacked(a), dx, 1.0)])


def _rule(
    op_name: str,
    low: Callable[[Node], Described | None],
    weights: Callable[[Node], Sequence[Described | None]],
    *,
    end: str = "",
    **keywords: Any,
) -> Callable[[Bind], Bind]:
    """Decorator: the base's products are made by one of MAKERS, the adapter's by aten, or by narrow kernels where these
    take x or dy and `low`."""

    def taken(node: Node, maker: Maker, narrow: type[Narrow]) -> bool:
        x = node.inputs[0]
        assert x is not None
        sizes = of_weights(x, weights(node), together=node.attrs.get("together", False))
        return maker.takes({x.dtype}, sizes) and (narrow is Aten or Native.fits(x, low(node)))

    def register(bind: Bind) -> Bind:
        for maker in MAKERS:
            for narrow in (Aten, Native):
                supports = partial(taken, maker=maker, narrow=narrow)
                label = f"{maker.label} + {narrow.label}{end}"
                made = partial(bind, product=maker.product, narrow=narrow)
                PLANNED.kernel(op_name, label=label, supports=supports, **keywords)(made)
        return bind

    return register


def made(node: Node) -> Described | None:
    return node.outputs[1]


def _of_group(node: Node, first: int) -> Sequence[Described | None]:
    return group_parts(node.inputs[first:], node.attrs["adapted"], node.attrs.get("biased", False))[0]


@_rule("lora_linear", made, lambda node: node.inputs[1:2])
def planned_lora_linear(
    run: Launches, ins: tuple, outs: tuple, *, product: Product, narrow: type[Narrow], scaling: float
) -> None:
    x, weight, bias, a, b = ins
    base = _products(run, [weight], [] if bias is None else [bias], product=product, together=False)
    forward(run, x, base, columns([weight]), [a], [b], outs, narrow=narrow, scaling=scaling)


@_rule(
    "lora_linear_bwd",
    lambda node: node.inputs[5],
    lambda node: node.inputs[2:3],
    inplace=lambda node: ((0, 6),) if node.attrs["needs"][0] else (),
)
def planned_lora_linear_bwd(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    product: Product,
    narrow: type[Narrow],
    needs: tuple[bool, bool, bool],
    scaling: float,
) -> None:
    dy, x, weight, a, b, low, acc = ins
    found = iter(outs)
    dx, da, db = (next(found) if need else None for need in needs)
    made = ((dx,) if needs[0] else ()) + (da, db)
    _backward(
        run,
        *(dy, x, low, acc, [weight], [a], [b], made),
        product=product,
        narrow=narrow,
        adapted=(True,),
        needs=(needs[0], needs[1] or needs[2]),
        scaling=scaling,
        together=False,
    )


@_rule("lora_linear_group", made, partial(_of_group, first=1), end=", stacked")
def planned_lora_linear_group(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    product: Product,
    narrow: type[Narrow],
    adapted: tuple[bool, ...],
    biased: bool,
    scaling: float,
    together: bool,
) -> None:
    x, *tensors = ins
    weights, biases, a, b = group_parts(tensors, adapted, biased)
    base = _products(run, weights, biases, product=product, together=together)
    forward(run, x, base, adapted_columns(weights, adapted), a, b, outs, narrow=narrow, scaling=scaling)


@_rule(
    "lora_linear_group_bwd",
    lambda node: node.inputs[2],
    partial(_of_group, first=4),
    end=", stacked",
    inplace=lambda node: ((0, 3),) if node.attrs["needs"][0] else (),
)
def planned_lora_linear_group_bwd(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    product: Product,
    narrow: type[Narrow],
    adapted: tuple[bool, ...],
    needs: tuple[bool, bool],
    scaling: float,
    together: bool,
) -> None:
    dy, x, low, acc, *tensors = ins
    weights, _, a, b = group_parts(tensors, adapted, False)
    _backward(
        run,
        *(dy, x, low, acc, weights, a, b, outs),
        product=product,
        narrow=narrow,
        adapted=adapted,
        needs=needs,
        scaling=scaling,
        together=together,
    )
