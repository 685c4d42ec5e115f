"""Fusion of a finished training graph: sums that a product can make on its way.

    dx = waiting + dy W        total += dy^T x

cuBLAS adds what is there before it rounds (beta = 1): one launch less, one pass over memory less, one rounding less.
"""

from __future__ import annotations

from collections.abc import Iterable

from smedjan.graph.node import Graph, Node
from smedjan.graph.rewrite import prune
from smedjan.graph.tensor import Tensor
from smedjan.ops.linear import linear_dw_add, linear_dx_add, linear_group_dw_add
from smedjan.passes.fuse import Has, Match, New, Rewrite, _input, only_reader


def fuse_backward(graph: Graph, has: Has) -> Graph:
    """Applied after `grad`, `decompose` and `cse`."""
    for find in (_waiting, _totals):
        matches = list(find(graph, has))
        if matches:
            graph = prune(Rewrite(graph, matches).run())
    return graph


def _waiting(graph: Graph, has: Has) -> Iterable[Match]:
    """add(waiting, linear_dx(dy, W)), in either order."""
    if not has("linear_dx_add"):
        return
    readers, outputs = graph.readers(), set(graph.outputs.values())
    taken: set[Node] = set()
    for node in graph.nodes:
        if node.op.name != "add" or _input(node, 0).spec != _input(node, 1).spec:
            continue
        for other, product in ((0, 1), (1, 0)):
            dx, acc = _input(node, product), _input(node, other)
            if dx.node.op.name == "linear_dx" and only_reader(dx, readers, outputs) is node and dx.node not in taken:
                taken.add(dx.node)
                yield _dx_add(node, acc, dx.node)
                break


def _dx_add(add: Node, acc: Tensor, dx: Node) -> Match:
    def build(new: New) -> dict[Tensor, Tensor]:
        return {add.outputs[0]: linear_dx_add(new(acc), new(_input(dx, 0)), new(_input(dx, 1)))}

    return Match(add, frozenset((add, dx)), build)


def _totals(graph: Graph, has: Has) -> Iterable[Match]:
    """accumulate(total, linear_dw(dy, x)), and the same of every member of a group."""
    readers, outputs = graph.readers(), set(graph.outputs.values())
    for node in graph.nodes:
        if node.op.name not in ("linear_dw", "linear_group_dw") or not has(f"{node.op.name}_add"):
            continue
        adds = [only_reader(out, readers, outputs) for out in node.outputs]
        if all(a is not None and a.op.name == "accumulate" and a.inputs[1] in node.outputs for a in adds):
            yield _dw_add(node, [a for a in adds if a is not None])


def _dw_add(dw: Node, adds: list[Node]) -> Match:
    def build(new: New) -> dict[Tensor, Tensor]:
        totals = [new(_input(add, 0)) for add in adds]
        dy, x = new(_input(dw, 0)), new(_input(dw, 1))
        made = linear_dw_add(*totals, dy, x) if dw.op.name == "linear_dw" else linear_group_dw_add(dy, x, *totals)
        results = made if isinstance(made, tuple) else (made,)
        return {add.outputs[0]: result for add, result in zip(adds, results, strict=True)}

    at = max(adds, key=lambda node: node.id)
    return Match(at, frozenset((dw, *adds)), build)
