"""Reverse-mode differentiation, graph to graph.

`grad` walks the nodes in reverse creation order and sums a fan-in in the order in which the cotangents arrive. That is
the order of torch.autograd (its ready queue is sorted by sequence number), so an exact backend gives autograd's bits.
Only what `wrt` depends on gets gradient nodes: a frozen weight costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from smedjan.graph.node import Graph, Node
from smedjan.graph.op import OPS, Outs
from smedjan.graph.tensor import Tensor


def grad(
    loss: Tensor, wrt: Sequence[Tensor], *, seeds: dict[Tensor, Tensor] | None = None, since: int = 0
) -> list[Tensor | None]:
    """d loss / d wrt, appended to the graph of `loss` (a scalar, seeded with one).

    With `seeds`, cotangents are given for any tensors instead (then `loss` is ignored), and only nodes from number
    `since` on are walked: that is how the backward op of a fused op differentiates its decomposition. A `wrt` that
    nothing depends on gives None.
    """
    add, ones = OPS["add"], OPS["ones"]  # by name: declarations live a layer above
    graph: Graph = loss.graph
    cotangents: dict[Tensor, Tensor] = dict(seeds) if seeds is not None else {loss: ones(graph=graph, dtype=loss.dtype)}
    last = max(tensor.node.id for tensor in cotangents)
    differentiable = _depends_on(graph.nodes[: last + 1], set(wrt))
    for node in graph.nodes[since : last + 1][::-1]:
        dys = [cotangents.get(out) for out in node.outputs]
        needs = tuple(tensor is not None and tensor in differentiable for tensor in node.inputs)
        if not any(needs) or all(dy is None for dy in dys):
            continue
        assert node.op.vjp_rule is not None, f"{node.op.name} has no VJP"
        acc = [
            cotangents.get(tensor) if tensor is not None and index in node.op.takes_acc and needs[index] else None
            for index, tensor in enumerate(node.inputs)
        ]
        public = len(node.outputs) - len(node.op.saves)
        outs = Outs(node.outputs[:public], node.outputs[public:])
        with graph.scope(_backward_scope(node)):
            ins = tuple(_remade(tensor) for tensor in node.inputs)
            results = node.op.vjp_rule(dys[:public], ins, outs, needs, acc, **node.attrs)
            assert len(results) == len(node.inputs), f"{node.op.name}: VJP gave {len(results)} cotangents"
            for index, (tensor, cotangent) in enumerate(zip(node.inputs, results, strict=True)):
                if tensor is None or cotangent is None or not needs[index]:
                    continue
                assert cotangent.spec == tensor.spec, f"{node.op.name}: cotangent {cotangent} for {tensor}"
                waiting = cotangents.get(tensor)
                if waiting is not None and acc[index] is None:
                    cotangent = add(waiting, cotangent)
                cotangents[tensor] = cotangent
    return [cotangents.get(tensor) for tensor in wrt]


def _backward_scope(node: Node) -> str:
    return f"{node.scope}.backward" if node.scope else "backward"


def _remade(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or the same computation once more where its op is declared so; unread, it is pruned."""
    if tensor is None or not tensor.node.op.remade:
        return tensor
    node = tensor.node
    return node.graph.add(node.op, node.inputs, node.attrs, tuple(out.spec for out in node.outputs))[tensor.index]


def _depends_on(nodes: list[Node], roots: set[Tensor]) -> set[Tensor]:
    """The floating-point tensors that depend on a root, the roots among them."""
    found = set(roots)
    for node in nodes:
        if any(tensor in found for tensor in node.inputs):
            found.update(out for out in node.outputs if out.dtype.startswith(("float", "bfloat")))
    return found
