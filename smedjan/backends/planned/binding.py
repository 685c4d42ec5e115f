"""What the rules of a program are given: arrays without memory, to see what they would start, or the planned places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor as Array

from smedjan.backends.planned.buffers import ARENA, HOST, INPUT_STORE, Buffers, Place, Store
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.pool import Pool
from smedjan.backends.planned.table import KernelRule
from smedjan.graph.node import Graph, Node
from smedjan.graph.tensor import Tensor


@dataclass(frozen=True, slots=True)
class HostNumbers:
    """Numbers that the host computes before each run from the scalars of these names, and where they go."""

    function: Callable[..., Sequence[float]]
    names: tuple[Any, ...]
    place: Array


@dataclass(frozen=True, slots=True)
class HostScalar:
    """A scalar input of the graph that a rule takes as a number of the host."""

    name: str


@dataclass(slots=True)
class HostValue:
    """The scalar input of this name, as the current run was given it."""

    name: str
    value: Any = None

    def __call__(self) -> Any:
        return self.value


@dataclass(kw_only=True)
class Held:
    """A program's places, and the memory that it has for them: `arrays` of its inputs, `results` of its outputs, the
    pool's `arena`, places of the host's numbers, and pinned buffers."""

    graph: Graph
    nodes: Sequence[Node]
    plan: Buffers
    pool: Pool
    scratch: list[Store] = field(default_factory=list)
    arrays: dict[str, Array] = field(default_factory=dict)
    results: dict[str, Array] = field(default_factory=dict)
    arena: Array | None = None
    numbers: list[HostNumbers] = field(default_factory=list)
    values: list[HostValue] = field(default_factory=list)
    number_places: list[Array] = field(default_factory=list)
    host_buffers: dict[Store, Array] = field(default_factory=dict)


class Unbound:
    """Arrays without memory: what a rule asks for is noted."""

    def __init__(self, held: Held) -> None:
        self.held = held

    def launches(self, position: int) -> Launches:
        def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Array:
            array = torch.empty(shape, dtype=dtype, device="meta")
            self.held.scratch.append(Store(ARENA, dtype, array.numel(), position, position))
            return array

        def host(function: Callable[..., Sequence[float]], scalars: Sequence[Any]) -> Array:
            return torch.empty(_count(function, scalars), dtype=torch.float32, device="meta")

        return Launches(
            torch.device("meta"),
            scratch=scratch,
            host=host,
            value=self._value,
            allocate=_without_memory,
            whole=self._whole(position),
        )

    def _whole(self, position: int) -> bool:
        """Whether all results of the node there are whole outputs of the graph: else they cannot be moved."""
        nodes = self.held.nodes
        return position < len(nodes) and all(self._is_whole(tensor) for tensor in nodes[position].outputs)

    def _is_whole(self, tensor: Tensor) -> bool:
        place = self.held.plan.places.get(tensor)
        if place is None:
            return True
        graph, store = self.held.graph, place.store
        if store.kind in (ARENA, HOST):
            return False
        shape = (graph.inputs if store.kind == INPUT_STORE else graph.outputs)[store.name].shape
        return tuple(place.array.shape) == shape and place.array.is_contiguous()

    def _value(self, scalar: Any) -> Callable[[], Any]:
        return HostValue(scalar.name) if isinstance(scalar, HostScalar) else lambda: scalar

    def array(self, place: Place) -> Array:
        return place.array

    def given(self, tensor: Tensor | None, rule: KernelRule) -> Any:
        if tensor is None:
            return None
        if rule.scalars and tensor.ndim == 0 and tensor.node.attrs.get("name") in self.held.graph.inputs:
            return HostScalar(tensor.node.attrs["name"])
        return self.array(self.held.plan.places[tensor])

    def result(self, tensor: Tensor) -> Array | None:
        place = self.held.plan.places.get(tensor)
        return None if place is None else self.array(place)


def _without_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Array:
    return torch.empty(shape, dtype=dtype, device="meta")


class Bound(Unbound):
    """Arrays in memory."""

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        self._scratch, self._hosts = iter(held.scratch), 0
        self.moved = False

    def launches(self, position: int) -> Launches:
        held = self.held

        def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Array:
            store = next(self._scratch)
            assert (store.numel, store.dtype) == (prod(shape), dtype), "another scratch than was planned"
            return self._base(store).view(shape)

        def host(function: Callable[..., Sequence[float]], scalars: Sequence[Any]) -> Array:
            if self._hosts == len(held.number_places):
                held.number_places.append(held.pool.allocate((_count(function, scalars),), torch.float32))
            place = held.number_places[self._hosts]
            self._hosts += 1
            held.numbers.append(HostNumbers(function, tuple(scalars), place))
            return place

        return Launches(
            held.pool.device,
            scratch=scratch,
            host=host,
            value=self._value,
            allocate=self._elsewhere,
            whole=self._whole(position),
            movable=self._movable,
        )

    def _elsewhere(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Array:
        """Memory for arrays that are moved."""
        self.moved = True
        return self.held.pool.allocate(shape, dtype, device)

    def _movable(self, array: Array) -> bool:
        held = self.held
        return any(array is other for other in (*held.arrays.values(), *held.results.values()))

    def _value(self, scalar: Any) -> Callable[[], Any]:
        value = super()._value(scalar)
        if isinstance(value, HostValue):
            self.held.values.append(value)
        return value

    def _base(self, store: Store) -> Array:
        held = self.held
        if store.kind == ARENA:
            arena = held.arena
            assert arena is not None
            return arena[store.offset : store.offset + store.nbytes].view(store.dtype)
        if store.kind == INPUT_STORE:
            return held.arrays[store.name]
        if store.kind == HOST:
            if store not in held.host_buffers:
                held.host_buffers[store] = held.pool.host(store.numel, store.dtype)
            return held.host_buffers[store]
        shape = held.graph.outputs[store.name].shape
        return held.results.setdefault(store.name, held.pool.output(store.name, shape, store.dtype))

    def array(self, place: Place) -> Array:
        """A whole input or output is the array itself, which rules may move behind another."""
        base, seen = self._base(place.store), place.array
        if place.store.kind != ARENA and base.shape == seen.shape and base.stride() == seen.stride():
            return base
        return base.as_strided(seen.shape, seen.stride(), base.storage_offset() + seen.storage_offset())


def _count(function: Callable[..., Sequence[float]], scalars: Sequence[Any]) -> int:
    """How many numbers the host computes: tried with ones."""
    return len(list(function(*(1 if isinstance(scalar, HostScalar) else scalar for scalar in scalars))))
