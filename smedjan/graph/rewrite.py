"""Graph-to-graph passes: replay, decompose, common subexpressions, dead code."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from smedjan.errors import BackendError
from smedjan.graph.grad import grad
from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.op import OPS, Op
from smedjan.graph.tensor import Tensor

Has = Callable[[Node], bool]


class Replay:
    """Copies nodes into a new graph, keeping creation order; subclasses change what is copied."""

    def __init__(self, source: Graph) -> None:
        self.source = source
        self.graph = Graph()
        self.map: dict[Tensor, Tensor | None] = {}

    def run(self, nodes: Iterable[Node] | None = None) -> Graph:
        for node in self.source.nodes if nodes is None else nodes:
            scopes = node.scope.split(".") if node.scope else []
            self.graph._scope[:] = scopes
            self.visit(node)
        self.graph._scope.clear()
        for name, tensor in self.source.outputs.items():
            mapped = self.map[tensor]
            assert mapped is not None, f"output {name!r} was a saved value of a decomposed op"
            self.graph.output(name, mapped)
        return self.graph

    def visit(self, node: Node) -> None:
        self.copy(node)

    def inputs(self, node: Node) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else self.map[tensor] for tensor in node.inputs)

    def copy(self, node: Node) -> None:
        if node.op is INPUT:
            old = node.outputs[0]
            self.map[old] = self.graph.input(node.attrs["name"], old.shape, old.dtype)
            return
        inputs = self.inputs(node)
        for source, new in zip(node.inputs, inputs, strict=True):
            if source is not None and new is None:
                raise BackendError(
                    f"{node.op.name} reads what {source.node.op.name} saves, which was decomposed away",
                    field=node.op.name,
                    remedy="lower both ops or neither",
                )
        outputs = self.graph.add(node.op, inputs, node.attrs, tuple(t.spec for t in node.outputs))
        self.map.update(zip(node.outputs, outputs, strict=True))


class _Decompose(Replay):
    def __init__(self, source: Graph, has: Has) -> None:
        super().__init__(source)
        self.has = has

    def visit(self, node: Node) -> None:
        if node.op is INPUT or self.has(node) or not can_decompose(node):
            self.copy(node)
            return
        results = expand(node.op, self.inputs(node), node.attrs, self.graph)
        for old, new in zip(node.outputs, results, strict=False):
            assert new is None or new.spec == old.spec, f"{node.op.name}: decomposition gave {new} for {old}"
            self.map[old] = new
        for old in node.outputs[len(results) :]:
            self.map[old] = None  # a saved value: only the op's own backward reads it, and that is decomposed too


def can_decompose(node: Node) -> bool:
    return node.op.decomposition is not None or node.op.name in BACKWARD_OF


def expand(op: Op, inputs: tuple[Tensor | None, ...], attrs: dict, graph: Graph) -> tuple[Tensor | None, ...]:
    """The public outputs of `op` by its decomposition, appended to `graph`."""
    if op.decomposition is not None:
        if not inputs:
            attrs = {**attrs, "graph": graph}
        made = op.decomposition(*inputs, **attrs)
        return tuple(made) if isinstance(made, tuple) else (made,)
    return BACKWARD_OF[op.name](inputs, attrs, graph)


BACKWARD_OF: dict[str, Callable[..., tuple[Tensor | None, ...]]] = {}
"""Backward ops that are defined as the gradient of their forward op's decomposition."""


def backward_by_decomposition(backward: Op, forward: Op, select: Callable[..., tuple]) -> None:
    """Defines `backward` as the VJP of `forward`'s decomposition: the forward is recomputed, then differentiated.

    `select(*inputs, **attrs)` gives (forward inputs, forward attributes, cotangents, needs, waiting cotangents) from
    the backward op's.
    """

    def run(inputs: tuple[Tensor | None, ...], attrs: dict, graph: Graph) -> tuple[Tensor | None, ...]:
        ins, forward_attrs, dys, needs, acc = select(*inputs, **attrs)
        # A fresh identity for each differentiated input: the same tensor may stand at two places.
        handles = [OPS["identity"](t) if need else t for t, need in zip(ins, needs, strict=True)]
        start = len(graph.nodes)
        made = expand(forward, tuple(handles), forward_attrs, graph)
        seeds = {out: dy for out, dy in zip(made, dys, strict=True) if out is not None and dy is not None}
        wrt = [handle for handle, need in zip(handles, needs, strict=True) if need]
        found = iter(grad(next(iter(seeds)), wrt, seeds=seeds, since=start))
        results: list[Tensor | None] = []
        for need, waiting in zip(needs, acc, strict=True):
            if need:
                cotangent = next(found)
                assert cotangent is not None
                results.append(cotangent if waiting is None else OPS["add"](waiting, cotangent))
        return tuple(results)

    BACKWARD_OF[backward.name] = run


def decompose(graph: Graph, has: Has) -> Graph:
    """Replaces every op that the backend lacks (`has(node)` is False) by its decomposition, as deep as needed."""
    while any(node.op is not INPUT and not has(node) and can_decompose(node) for node in graph.nodes):
        graph = prune(_Decompose(graph, has).run())
    return graph


class _Cse(Replay):
    def __init__(self, source: Graph) -> None:
        super().__init__(source)
        self.seen: dict[tuple, tuple[Tensor, ...]] = {}

    def visit(self, node: Node) -> None:
        if not node.op.pure:
            self.copy(node)
            return
        key = (node.op.name, self.inputs(node), tuple(sorted(node.attrs.items())))
        if key in self.seen:
            self.map.update(zip(node.outputs, self.seen[key], strict=True))
            return
        self.copy(node)
        self.seen[key] = tuple(self.map[t] for t in node.outputs)  # type: ignore[misc]


def cse(graph: Graph) -> Graph:
    """Merges equal pure nodes. Not run over what must be computed twice."""
    return _Cse(graph).run()


def distinct_outputs(graph: Graph) -> Graph:
    """Gives each output a tensor of its own: callers donate them, and a sum in place must not reach another one."""
    seen: set[Tensor] = set()
    for name, tensor in graph.outputs.items():
        if tensor in seen:
            graph.outputs[name] = OPS["copy"](tensor)
        seen.add(tensor)
    return graph


def prune(graph: Graph) -> Graph:
    """Drops what no output depends on; inputs stay, since callers bind them by name."""
    keep = set(graph.live_nodes())
    return Replay(graph).run(node for node in graph.nodes if node in keep or node.op is INPUT)
