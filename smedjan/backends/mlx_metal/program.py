"""A program on MLX: segments, each one lazy graph, asked for in order, in memory that the plan bounds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from smedjan.backends.mlx_metal import segments
from smedjan.backends.mlx_metal.cache import HOST_INPUTS
from smedjan.graph.lowering import RuleTable
from smedjan.graph.node import Graph
from smedjan.graph.program import Observer, Program

RUN_AHEAD = 32 << 20
"""Bytes that are worth no wait: MLX may always allocate so many before what runs is done."""


@dataclass
class Pool:
    """What the programs of one session share: the memory that each may take (None: any), compiled functions."""

    memory: int | None = None
    functions: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)


class MlxProgram(Program):
    """With `fuse`, each segment is compiled in which no host integer (a cache's start, end) decides shapes.

    What an op donates is replaced in the array that the caller holds, as in-place backends do: nobody holds the old
    values while the new ones are made, and MLX can write them into the old ones' buffers.
    """

    def __init__(
        self,
        graph: Graph,
        rules: RuleTable,
        *,
        fuse: bool,
        pool: Pool | None = None,
        cut: bool = True,
    ) -> None:
        super().__init__(graph, rules)
        hosts = {
            call.node.inputs[HOST_INPUTS[call.node.op.name]] for call in self.calls if call.node.op.name in HOST_INPUTS
        }
        self._host_names = {name for name, tensor in graph.inputs.items() if tensor in hosts}
        self.fused = fuse
        slots = {tensor: index + 1 for index, tensor in enumerate(t for node in graph.nodes for t in node.outputs)}
        # What a cache holds decides shapes that nobody knows yet: no memory is planned for such a program.
        self.bounded = not hosts
        told = {
            node: own for node, own in self.temporaries.items() if hosts or rules.lower(node).temporaries is not None
        }
        self.schedule = segments.schedule(graph, self.calls, slots, fused=self.fused, told=told, cut=cut and not hosts)
        self.temporaries = {
            node: max(0, extra - sum(out.nbytes for out in node.outputs)) for node, extra in self.schedule.extra.items()
        }
        pool = pool or Pool()
        self._functions = [self._function(each, pool) for each in self.schedule.segments]
        self._sites = [
            [mx.array(site, dtype=mx.uint32) if self._compiles(each) else site for site in each.sites]
            for each in self.schedule.segments
        ]

    def _function(self, segment: segments.Segment, pool: Pool) -> Callable[..., Any]:
        compiled = self._compiles(segment)
        key = (compiled, segment.key)
        if key not in pool.functions:
            made = segments.function(segment, self.calls)
            pool.functions[key] = mx.compile(made) if compiled else made
        return pool.functions[key]

    def _compiles(self, segment: segments.Segment) -> bool:
        return self.fused and not segment.dynamic

    def __call__(self, inputs: Mapping[str, Any], *, observe: Observer | None = None) -> dict[str, mx.array]:
        bound = {name: inputs[name] if name in self._host_names else _array(inputs[name]) for name in self.graph.inputs}
        if observe is not None:
            made = super().__call__(bound, observe=observe)
            mx.eval(made)
            return made
        with self._memory():
            return self._run(bound)

    def _run(self, bound: Mapping[str, Any]) -> dict[str, mx.array]:
        slots: list[Any] = [None] * self._size
        for name, index in self._inputs.items():
            slots[index] = bound[name]
        last = len(self._functions) - 1
        for number, (segment, function) in enumerate(zip(self.schedule.segments, self._functions, strict=True)):
            made = list(function(self._sites[number], *(slots[index] for index in segment.ins)))
            for source, place in segment.donated:
                slots[source][:] = made[place]
                made[place] = slots[source]
            for index in segment.frees:
                slots[index] = None
            for index, value in zip(segment.outs, made, strict=True):
                slots[index] = value
            if number < last and self.bounded:
                mx.async_eval(made)
            del made
        outputs = {name: slots[index] for name, index in self._outputs.items()}
        mx.eval(outputs)
        return outputs

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """While more than the plan is alive, MLX waits for what runs before it allocates more."""
        if not self.bounded:
            yield
            return
        own = self.schedule.peak - self.schedule.inputs - self.schedule.largest
        before = mx.set_memory_limit(mx.get_active_memory() + max(own, RUN_AHEAD))
        try:
            yield
        finally:
            mx.set_memory_limit(before)

    @property
    def peak_bytes(self) -> int:
        return self.schedule.peak


def _array(value: Any) -> mx.array:
    """A learning rate, step or seed as an array: as a Python number it would be a constant of the compiled program."""
    if isinstance(value, mx.array):
        return value
    if isinstance(value, float):
        return mx.array(value, dtype=mx.float32)
    return mx.array(value, dtype=mx.int32 if value < 2**31 else mx.int64)
