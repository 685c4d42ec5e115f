"""A decoding program: its kernels on one tape over buffers that stay, with aten calls only where no kernel is.

The tape is written when a call first brings its arrays, and anew when they lie elsewhere (the caches of the next
generation). A token then costs one call into the library for each stretch between two aten calls: for most families one
in all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor as Array

from smedjan.backends.cpu_native.native import tape
from smedjan.backends.cpu_native.table import NativeRule
from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.graph.lowering import RuleTable
from smedjan.graph.node import Graph, Node
from smedjan.graph.program import Call, Observer, Program
from smedjan.graph.tensor import Tensor

VIEWS = ("split", "split_heads", "merge_heads", "swap_heads", "reshape", "slice_last", "narrow")
"""Ops that move nothing where there is one token."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one node runs: steps first to last - 1 of the tape, or `call`, and nothing for a view."""

    node: Node
    first: int
    last: int
    call: Callable[[], None] | None


class NativeProgram(Program):
    """`program(inputs) -> outputs`. Caches are written in place and given back; other outputs are copies."""

    def __init__(self, graph: Graph, rules: RuleTable) -> None:
        super().__init__(graph, rules)
        self._rules = [rules.find(call.node) for call in self.calls]
        kernels = {
            call.node for call, rule in zip(self.calls, self._rules, strict=True) if isinstance(rule, NativeRule)
        }
        self._read_by_kernels = {tensor for tensor, readers in graph.readers().items() if kernels.intersection(readers)}
        self._bound: list[int] = []
        self._copied = {
            name: tape.allocate(tensor.shape, DTYPES[tensor.dtype])
            for name, tensor in graph.inputs.items()
            if not _stays(tensor)
        }
        self._arrays_of = itemgetter(*(name for name in graph.inputs if name not in self._copied))

    def __call__(self, inputs: Mapping[str, Any], *, observe: Observer | None = None) -> dict[str, Any]:
        for name, buffer in self._copied.items():
            value = inputs[name]
            if isinstance(value, Array):
                buffer.copy_(value)
            else:
                buffer.fill_(value)
        addresses = list(map(Array.data_ptr, self._arrays_of(inputs)))
        if addresses != self._bound:
            self._bind(inputs)
            self._bound = addresses
        if observe is None:
            for run in self._stretches:
                run()
        else:
            for part in self._parts:
                self._stretch(part.first, part.last)()
                if part.call is not None:
                    part.call()
                seen = (self._values.get(tensor) for tensor in part.node.outputs)
                observe(part.node, tuple(x.clone() if isinstance(x, Array) else x for x in seen))
        made = {name: inputs[given] for name, given in self._caches}
        made.update((name, _copied(self._values[tensor])) for name, tensor in self._made)
        return made

    def _bind(self, inputs: Mapping[str, Any]) -> None:
        graph, self._tape = self.graph, tape.Tape()
        self._values: dict[Tensor, Any] = {
            tensor: self._copied[name] if name in self._copied else inputs[name]
            for name, tensor in graph.inputs.items()
        }
        self._updated = {tensor: name for name, tensor in graph.inputs.items()}
        static = set(self._values)
        self._parts: list[Part] = []
        for call, rule in zip(self.calls, self._rules, strict=True):
            node, first, run = call.node, len(self._tape.steps), None
            if isinstance(rule, NativeRule):
                self._write(node, rule)
                static.update(node.outputs)
            elif node.op.name in VIEWS and node.inputs[0] in static and self._view(call):
                static.update(node.outputs)
            else:
                run = self._call(call)
                static.update(self._read_by_kernels.intersection(node.outputs))
            self._parts.append(Part(node, first, len(self._tape.steps), run))
        outputs = self.graph.outputs.items()
        self._caches = [(name, self._updated[tensor]) for name, tensor in outputs if tensor in self._updated]
        self._made = [(name, tensor) for name, tensor in outputs if tensor not in self._updated]
        self._tape.seal()
        self._stretches = self._joined()

    def _write(self, node: Node, rule: NativeRule) -> None:
        updated = dict(node.op.donated(node))
        for index, tensor in enumerate(node.outputs):
            if index in updated:
                source = node.inputs[updated[index]]
                assert source is not None
                self._values[tensor] = self._values[source]
                self._updated[tensor] = self._updated[source]
            else:
                self._values[tensor] = tape.allocate(tensor.shape, DTYPES[tensor.dtype])
        ins = tuple(None if tensor is None else self._values[tensor] for tensor in node.inputs)
        rule.write(self._tape, ins, tuple(self._values[tensor] for tensor in node.outputs), **node.attrs)

    def _view(self, call: Call) -> bool:
        """Whether the op's result lies in its input's memory, in C order, and is taken as such."""
        source = self._values[_first(call.node)]
        made = call.run(source)
        parts = [made] if isinstance(made, Array) else list(made)
        within = range(source.data_ptr(), source.data_ptr() + max(source.nbytes, 1))
        if not all(part.is_contiguous() and part.data_ptr() in within for part in parts):
            return False
        self._values.update(zip(call.node.outputs, parts, strict=True))
        return True

    def _call(self, call: Call) -> Callable[[], None]:
        """An aten call, its results copied to where kernels read them."""
        node, values, kept = call.node, self._values, self._read_by_kernels
        for tensor in kept.intersection(node.outputs):
            values[tensor] = tape.allocate(tensor.shape, DTYPES[tensor.dtype])

        def run() -> None:
            made = call.run(*(None if tensor is None else values[tensor] for tensor in node.inputs))
            for tensor, value in zip(node.outputs, (made,) if len(node.outputs) == 1 else made, strict=True):
                if tensor in kept:
                    values[tensor].copy_(value)
                else:
                    values[tensor] = value

        return run

    def _stretch(self, first: int, last: int) -> Callable[[], None]:
        return lambda: self._tape.play(first, last) if last > first else None

    def _joined(self) -> list[Callable[[], None]]:
        """What a call runs: the steps between two aten calls at once."""
        made: list[Callable[[], None]] = []
        first = 0
        for part in self._parts:
            if part.call is not None:
                made += [self._stretch(first, part.first), part.call]
                first = part.first
        return [*made, self._stretch(first, len(self._tape.steps))]


def _copied(array: Array) -> Array:
    """By this thread alone: torch would wake its own threads for as much as logits are, and they go on spinning where
    ours should run."""
    made = torch.empty_like(array, memory_format=torch.contiguous_format)
    ctypes.memmove(made.data_ptr(), array.data_ptr(), array.nbytes)
    return made


def _first(node: Node) -> Tensor:
    tensor = node.inputs[0]
    assert tensor is not None
    return tensor


def _stays(tensor: Tensor) -> bool:
    """Whether an input is read where it lies (weights, caches) rather than copied in (tokens, positions, lengths)."""
    return tensor.ndim > 0 and tensor.dtype not in ("int64", "int32", "bool")
