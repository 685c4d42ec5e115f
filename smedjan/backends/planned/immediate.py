"""One op's launches over results that are allocated now: how a rule runs where nothing is planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.planned.launch import Launch, Launches
from smedjan.backends.torch_reference.elementwise import DTYPES, NAMES
from smedjan.graph.node import Graph, Node
from smedjan.graph.op import OPS
from smedjan.ops import (  # noqa: F401  (each fills OPS)
    activation,
    attention,
    cache,
    elementwise,
    embedding,
    fp8,
    glu,
    linear,
    lora,
    loss,
    norm,
    offload,
    optimizer,
    quantized,
    random,
    rope,
    w8a8,
)
from smedjan.ops import shape as shape_ops  # noqa: F401


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every buffer that is made here; the tests put a poisoned and guarded one in its place."""
    return torch.empty(shape, dtype=dtype, device=device)


def node_of(op_name: str, ins: Sequence[Any], attrs: dict[str, Any]) -> Node:
    """A graph of this one op, whose shape rule says what the results are; host scalars are scalars of the graph."""
    graph = Graph()
    inputs: list[Any] = []
    for index, value in enumerate(ins):
        if value is None:
            inputs.append(None)
        elif isinstance(value, Tensor):
            inputs.append(graph.input(f"{index}", tuple(value.shape), NAMES[value.dtype]))
        else:
            inputs.append(graph.input(f"{index}", (), "int64" if isinstance(value, int) else "float32"))
    OPS[op_name](*inputs, **attrs, **({} if graph.inputs else {"graph": graph}))
    return next(node for node in reversed(graph.nodes) if node.op.name == op_name)


def device_of(ins: Sequence[Any]) -> torch.device:
    return next((value.device for value in ins if isinstance(value, Tensor)), torch.device("cpu"))


def _array(value: Any, device: torch.device) -> Any:
    return value if value is None or isinstance(value, Tensor) else torch.tensor(value, device=device)


def immediate(device: torch.device) -> Launches:
    """A list whose scratch is allocated as it is asked for and whose host scalars are copied at once."""

    def host(function: Callable[..., Sequence[float]], scalars: Sequence[Any]) -> Tensor:
        return torch.tensor(list(function(*scalars)), dtype=torch.float32, device=device)

    return Launches(
        device, scratch=lambda shape, dtype: allocate(shape, dtype, device), host=host, allocate=lambda *a: allocate(*a)
    )


def written(
    op_name: str, bind: Callable[..., None], donates: Callable[..., Any], scalars: bool, *ins: Any, **attrs: Any
) -> tuple[list[Launch], list[Tensor]]:
    """The op's launches over fresh results, not run yet, and those results."""
    node, device = node_of(op_name, ins, attrs), device_of(ins)
    given = ins if scalars else tuple(_array(value, device) for value in ins)
    padded = (*given, *(None,) * (len(node.inputs) - len(ins)))
    outs = [allocate(t.shape, DTYPES[t.dtype], device) for t in node.outputs]
    for index, taken in donates(node):
        outs[index] = padded[taken]
    run = immediate(device)
    bind(run, padded, tuple(outs), **node.attrs)
    return run.calls, outs


def run_now(
    op_name: str, bind: Callable[..., None], donates: Callable[..., Any], scalars: bool, *ins: Any, **attrs: Any
) -> Any:
    """The op's results, saved ones among them: a tensor, or a tuple of several."""
    calls, outs = written(op_name, bind, donates, scalars, *ins, **attrs)
    for call in calls:
        call()
    return outs[0] if len(outs) == 1 else tuple(outs)


def view_now(
    op_name: str, view: Callable[..., Any], inverse: Callable[[Tensor, Node], Tensor] | None, x: Tensor, **attrs: Any
) -> Any:
    """The view. Where x's strides do not allow one of x itself, its values are copied: to their place in a result in C
    order, where the rule knows it."""
    try:
        return view(x, **attrs)
    except RuntimeError:
        if inverse is None:
            return view(x.contiguous(), **attrs)
    node = node_of(op_name, (x,), attrs)
    y = allocate(node.outputs[0].shape, x.dtype, x.device)
    inverse(y, node).copy_(x)
    return y
