"""A planned program: a fixed list of launches over planned buffers, replayed step after step.

It is planned once, from shapes alone (`launches`, `peak_bytes`: no GPU is needed), and bound to memory when it is first
called. Parameters, gradients and moments are read and written where they lie; what changes from call to call (tokens,
labels, counts, a learning rate) is copied into buffers that stay. On a GPU the list is captured as a CUDA graph in its
second run. Inside a run nothing is allocated and nothing waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor as Array

from smedjan.backends.planned import buffers
from smedjan.backends.planned.binding import Bound, Held, HostScalar, Unbound
from smedjan.backends.planned.buffers import ARENA, HOST, INPUT_STORE, Place
from smedjan.backends.planned.launch import Launch, Launches
from smedjan.backends.planned.pool import Pool
from smedjan.backends.planned.table import PlannedRules, ViewRule
from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.graph.no_gc import no_gc
from smedjan.graph.node import Graph, Node
from smedjan.graph.program import Call, Observer, Program
from smedjan.graph.tensor import Tensor

RESULTS = 4096
"""Calls for which the scalars that a program gave back (losses, norms) are kept before their places are reused."""


@dataclass(frozen=True, slots=True)
class Step:
    """The launches of one node."""

    node: Node
    calls: tuple[Launch, ...]


class PlannedProgram(Program):
    """`program(inputs) -> outputs`. Outputs are buffers of the pool that the next call overwrites, except for scalars
    and for what no later call is given back (logits), which are copied."""

    def __init__(self, graph: Graph, rules: PlannedRules, pool: Pool) -> None:
        super().__init__(graph, rules)
        self._copy = rules.copy
        self.pool = pool
        self._nodes = [call.node for call in self.calls]
        self._rules: list[Any] = [rules.lower(node) for node in self._nodes]
        self.plan = buffers.plan(graph, self._nodes, self._rules)
        self._held = Held(graph=graph, nodes=self._nodes, plan=self.plan, pool=pool)
        self._recorded = self._write_down(Unbound(self._held))
        self._place = {step.node: index for index, step in enumerate(self._recorded[: len(self._nodes)])}
        self.plan.stores.extend(self._held.scratch)
        self.plan.arena = buffers.settle(self.plan.stores)
        self._bound: dict[str, int] = {}
        self._steps: list[Step] = []
        self._calls: list[Launch] = []
        self._static: dict[str, Array] = {}
        self._copied: dict[str, tuple[int, int]] = {}
        self._sources: dict[str, Array] = {}
        self._kept: Array | None = None
        self._runs = 0
        self._captured: torch.cuda.CUDAGraph | None = None
        self._outputs_at: list[tuple[Array, int]] = []

    # What is known without running.

    def recorded(self) -> list[Launch]:
        """Every launch of a run, in order, over arrays without memory."""
        return [call for step in self._recorded for call in step.calls]

    def launches(self) -> Counter[str]:
        return Counter(call.name for call in self.recorded())

    def starts(self, call: Call) -> bool:
        return bool(self._recorded[self._place[call.node]].calls)

    @property
    def peak_bytes(self) -> int:
        """Inputs, outputs, the arena, and the most that a rule allocates besides: what a run needs on the device,
        exactly, but for the libraries' workspaces that no rule knows."""
        own = sum(store.nbytes for store in self.plan.stores if store.kind not in (ARENA, HOST))
        return own + self.plan.arena + max(self.temporaries.values(), default=0)

    @property
    def arena_bytes(self) -> int:
        return self.plan.arena

    # Writing launches down, on memory or without.

    def _write_down(self, on: Any) -> list[Step]:
        steps = []
        for position, (node, rule) in enumerate(zip(self._nodes, self._rules, strict=True)):
            run = on.launches(position)
            for source, copied in self.plan.copies.get(position, ()):
                self._copy(run, on.array(source), on.array(copied))
            if node.op.name == "concat":
                self._concat(run, node, on)
            elif not isinstance(rule, ViewRule):
                ins = tuple(on.given(tensor, rule) for tensor in node.inputs)
                outs = tuple(on.result(tensor) for tensor in node.outputs)
                rule.bind(run, ins, outs, **node.attrs)
            steps.append(Step(node, tuple(run.calls)))
        run = on.launches(len(self._nodes))
        for source, copied in self.plan.copies.get(len(self._nodes), ()):
            self._copy(run, on.array(source), on.array(copied))
        if run.calls:
            steps.append(Step(self._nodes[-1], tuple(run.calls)))
        return steps

    def _concat(self, run: Launches, node: Node, on: Any) -> None:
        """Copies of the parts that were not written in their place."""
        whole, start, dim = self.plan.places[node.outputs[0]], 0, node.attrs["dim"]
        for index, part in enumerate(node.inputs):
            assert part is not None
            size = part.shape[dim]
            if (node, index) not in self.plan.elided:
                place = Place(whole.store, whole.array.narrow(dim, start, size))
                self._copy(run, on.array(self.plan.places[part]), on.array(place))
            start += size

    # Running.

    def __call__(self, inputs: Mapping[str, Any], *, observe: Observer | None = None) -> dict[str, Any]:
        self._take(inputs)
        self._tell(inputs)
        return self._play(observe)

    def again(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return self._play(None)

    def _play(self, observe: Observer | None) -> dict[str, Any]:
        if observe is not None:
            self._observed(observe)
        elif self._captured is not None:
            self._captured.replay()
        elif self.pool.device.type == "cuda" and self._runs:
            self._capture()
        else:
            for call in self._calls:
                call()
        self._runs += 1
        return {name: self._given_back(name, tensor) for name, tensor in self.graph.outputs.items()}

    def _take(self, inputs: Mapping[str, Any]) -> None:
        """Binds anew where an array lies elsewhere than at the last call, and copies in what changes."""
        given = {name: inputs[name] for name in self.graph.inputs}
        fixed = {name: array for name, array in given.items() if _stays(self.graph.inputs[name])}
        addresses = {name: array.data_ptr() for name, array in fixed.items()}
        arena = self.pool.arena_of(self.plan.arena)
        if not self._steps or addresses != self._bound or arena is not self._held.arena or self._moved():
            self._bind(fixed)
        for name, array in self._static.items():
            value = given[name]
            if isinstance(value, Array):
                if self._copied.get(name) == (id(value), value._version):
                    continue  # a constant, such as the offset of quantized scales
                self._copied[name] = (id(value), value._version)
                self._sources[name] = value
                # A mask over the tokens of a cache is as long as they are so far, its buffer as the cache.
                corner = array if value.shape == array.shape else array[tuple(slice(size) for size in value.shape)]
                corner.copy_(value, non_blocking=True)
            else:
                array.fill_(value)

    def _moved(self) -> bool:
        return any(array.data_ptr() != address for array, address in self._outputs_at)

    def unbind(self) -> None:
        """Lets go of the arena: the next call binds anew."""
        self._captured, self._steps, self._calls, self._outputs_at = None, [], [], []
        self._held.arena, self._held.results, self._held.numbers, self._held.values = None, {}, [], []

    def _bind(self, fixed: Mapping[str, Array]) -> None:
        pool = self.pool
        pool.users.add(self)
        self._captured, self._runs = None, 0
        self._held.arena = pool.arena_of(self.plan.arena)
        for name, tensor in self.graph.inputs.items():
            if not _stays(tensor) and name not in self._static:
                self._static[name] = pool.allocate(tensor.shape, DTYPES[tensor.dtype])
        self._held.arrays = {**fixed, **self._static}
        on = None
        while on is None or on.moved:
            # A rule may move arrays that must lie one behind another, of which others hold addresses already.
            self._held.numbers, self._held.values = [], []
            on = Bound(self._held)
            with no_gc():
                self._steps = self._write_down(on)
        self._calls = [call for step in self._steps for call in step.calls]
        self._bound = {name: array.data_ptr() for name, array in fixed.items()}
        self._outputs_at = [(array, array.data_ptr()) for array in self._held.results.values()]

    def _tell(self, inputs: Mapping[str, Any]) -> None:
        """The host's numbers: a learning rate, a step."""
        for value in self._held.values:
            value.value = inputs[value.name]
        for numbers in self._held.numbers:
            values = numbers.function(*(inputs[x.name] if isinstance(x, HostScalar) else x for x in numbers.names))
            numbers.place.copy_(torch.tensor(list(values), dtype=torch.float32), non_blocking=True)

    def _capture(self) -> None:
        """Records the list as a CUDA graph, and runs it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in self._calls:
                call()
        graph.replay()
        self._captured = graph

    def _observed(self, observe: Observer) -> None:
        """Node by node; what is seen is copied, since its buffer serves others later."""
        on = Bound(self._held)
        steps = iter(self._steps)
        for node in self._nodes:
            for call in next(steps).calls:
                call()
            seen = (on.result(tensor) for tensor in node.outputs)
            observe(node, tuple(None if array is None else array.clone() for array in seen))
        for step in steps:
            for call in step.calls:
                call()

    def _given_back(self, name: str, tensor: Tensor) -> Array:
        place = self.plan.places[tensor]
        if place.store.kind == INPUT_STORE:
            return self._held.arrays[place.store.name]
        array = self._held.results[name]
        if tensor.shape == ():
            return self._keep(array)
        return array if name.startswith("grad.") else array.clone()

    def _keep(self, scalar: Array) -> Array:
        """A scalar's copy in a ring: several calls' losses are read when the step is done."""
        count = sum(t.shape == () for t in self.graph.outputs.values())
        if self._kept is None:
            self._kept, self._next = self.pool.allocate((RESULTS * count,), scalar.dtype), 0
        place = self._kept[self._next % self._kept.numel()]
        self._next += 1
        place.copy_(scalar)
        return place


def _stays(tensor: Tensor) -> bool:
    """Whether an input is read where it lies (parameters, gradients, moments, caches) rather than copied in (tokens,
    labels, masks, counts)."""
    return tensor.ndim > 0 and tensor.dtype not in ("int64", "int32", "bool")
