"""The product of linear layers in 8-bit floats, where it is asked for: y = fp8(x) fp8(W)^T."""

from __future__ import annotations

from collections.abc import Collection

from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.rewrite import Replay
from smedjan.ops.fp8 import MULTIPLE, fp8_linear
from smedjan.ops.linear import linear


class _Fp8(Replay):
    def __init__(self, source: Graph, keep: Collection[str]) -> None:
        super().__init__(source)
        self.keep = keep

    def visit(self, node: Node) -> None:
        if self._takes(node):
            self.map[node.outputs[0]] = fp8_linear(*self.inputs(node))
        else:
            self.copy(node)

    def _takes(self, node: Node) -> bool:
        weight = node.inputs[1] if node.op is linear else None
        return (
            weight is not None
            and weight.node.op is INPUT
            and weight.node.attrs["name"] not in self.keep
            and weight.dtype == "bfloat16"
            and all(size % MULTIPLE == 0 for size in weight.shape)
        )


def fp8(graph: Graph, *, keep: Collection[str] = ()) -> Graph:
    """The forward graph with `fp8_linear` for every linear layer over a bfloat16 parameter whose dims are multiples of
    16; those named in `keep` (the head) stay as they are. Apply before `grad`."""
    return _Fp8(graph, keep).run()
