"""Nodes and the graph that owns them.

Nodes are kept in creation order, which is also a topological order. **Creation order is semantics**: `grad` walks it
backwards, so the order in which a fan-in is summed is the order in which its readers were written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from smedjan.graph.op import Op
from smedjan.graph.tensor import Spec, Tensor

Attrs = dict[str, Any]


@dataclass(eq=False, slots=True)
class Node:
    """One application of an op. `inputs` holds None where an optional tensor was not given."""

    graph: Graph
    id: int
    op: Op
    inputs: tuple[Tensor | None, ...]
    attrs: Attrs
    outputs: tuple[Tensor, ...] = ()
    scope: str = ""

    def __repr__(self) -> str:
        return f"%{self.id} = {self.op.name}({', '.join(map(repr, self.inputs))})"


@dataclass(eq=False)
class Graph:
    """A list of nodes with named inputs and outputs."""

    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    _scope: list[str] = field(default_factory=list)

    def input(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A named input: a parameter, a batch array, a cache or a scalar. The same name twice is a mistake of ours."""
        assert name not in self.inputs, f"input {name!r} declared twice"
        tensor = self.add(INPUT, (), {"name": name}, (Spec(tuple(shape), dtype),))[0]
        self.inputs[name] = tensor
        return tensor

    def output(self, name: str, tensor: Tensor) -> None:
        assert name not in self.outputs, f"output {name!r} declared twice"
        assert tensor.graph is self, f"output {name!r} belongs to another graph"
        self.outputs[name] = tensor

    def add(
        self, op: Op, inputs: tuple[Tensor | None, ...], attrs: Attrs, specs: tuple[Spec, ...]
    ) -> tuple[Tensor, ...]:
        for tensor in inputs:
            assert tensor is None or tensor.graph is self, f"{op.name}: an input belongs to another graph"
        node = Node(self, len(self.nodes), op, inputs, attrs, scope=".".join(self._scope))
        node.outputs = tuple(Tensor(spec, node, index) for index, spec in enumerate(specs))
        self.nodes.append(node)
        return node.outputs

    def scope(self, name: str) -> _Scope:
        """`with graph.scope("layers.3"):` labels the nodes made inside, for printing and for parity's bisection."""
        return _Scope(self, name)

    def readers(self) -> dict[Tensor, list[Node]]:
        """Every tensor's reading nodes, in creation order."""
        found: dict[Tensor, list[Node]] = {}
        for node in self.nodes:
            for tensor in node.inputs:
                if tensor is not None:
                    found.setdefault(tensor, []).append(node)
        return found

    def live_nodes(self) -> list[Node]:
        """The nodes that an output depends on, in creation order."""
        wanted = {tensor.node for tensor in self.outputs.values()}
        live = []
        for node in reversed(self.nodes):
            if node in wanted:
                live.append(node)
                wanted.update(tensor.node for tensor in node.inputs if tensor is not None)
        return live[::-1]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)


@dataclass(slots=True)
class _Scope:
    graph: Graph
    name: str

    def __enter__(self) -> None:
        self.graph._scope.append(self.name)

    def __exit__(self, *_: object) -> None:
        self.graph._scope.pop()


INPUT = Op(name="input", rule=lambda: (), pure=False)
"""The pseudo-op of graph inputs; backends bind it, never lower it."""
