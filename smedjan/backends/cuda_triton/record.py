"""The launches of an example, on arrays without memory or with it: what is built, counted and tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cuda_triton import tuned
from smedjan.backends.cuda_triton.examples.example import Example
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.planned.launch import Launch, Launches
from smedjan.backends.planned.table import KernelRule
from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.graph.node import Node

Make = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""(shape, dtype) -> a contiguous array."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """An example's node, and its launches in order."""

    node: Node
    launches: tuple[Launch, ...]


def without_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def record(example: Example, *, capability: int, make: Make = without_memory) -> Recorded:
    """What the example's rule writes down for an architecture of this compute capability (times ten)."""
    with tuned.architecture(capability):
        return _record(example, make)


def _record(example: Example, make: Make) -> Recorded:
    node = node_of(example.op, example.ins, dict(example.attrs))
    rule = RULES.lower(node)
    assert isinstance(rule, KernelRule), f"{example.op} {example.name}: run as {rule.label!r}, which launches no kernel"
    given = [_input(value, rule, make) for value in example.ins]
    for index, filled in example.fill.items():
        if isinstance(filled, range):
            cycle = torch.arange(given[index].numel()) % len(filled) * filled.step + filled.start
            given[index].copy_(cycle.view(given[index].shape))
        else:
            given[index].fill_(filled)
    ins = (*given, *(None,) * (len(node.inputs) - len(given)))
    outs: list[Tensor | None] = [_output(t.shape, DTYPES[t.dtype], rule, i, make) for i, t in enumerate(node.outputs)]
    for index, taken in rule.donates(node):
        outs[index] = ins[taken]
    for index in example.unread:
        outs[index] = None

    def host(function: Callable[..., Sequence[float]], scalars: Sequence[Any]) -> Tensor:
        numbers = torch.tensor(list(function(*scalars)), dtype=torch.float32)
        return make(tuple(numbers.shape), torch.float32).copy_(numbers)

    run = Launches(
        make((0,), torch.float32).device,
        scratch=make,
        host=host,
        allocate=lambda shape, dtype, device: make(shape, dtype),
    )
    rule.bind(run, ins, tuple(outs), **node.attrs)
    return Recorded(node=node, launches=tuple(run.calls))


def _input(value: Any, rule: KernelRule, make: Make) -> Any:
    """The example's array as `make` makes them, with its strides and its place in a wider one."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return value if rule.scalars else make((), torch.int64 if isinstance(value, int) else torch.float32)
    behind = value.untyped_storage().nbytes() // value.itemsize
    return make((behind,), value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())


def _output(shape: Sequence[int], dtype: torch.dtype, rule: KernelRule, index: int, make: Make) -> Tensor:
    order = rule.order.get(index)
    if order is None:
        return make(tuple(shape), dtype)
    inner = make(tuple(shape[dim] for dim in order), dtype)
    return inner.permute([order.index(dim) for dim in range(len(shape))])
