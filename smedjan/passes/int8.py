"""Weights of 8 bits for inference, as a graph pass: linear layers and embeddings read the codes themselves.

    NAME [O, I]  ->  NAME.int8 int8 [O, I], NAME.scale float32 [O]

What else reads a weight (a head's loss) reads it dequantised.
"""

from __future__ import annotations

from collections.abc import Iterable

from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.rewrite import Replay, prune
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.embedding import embedding
from smedjan.ops.linear import linear
from smedjan.ops.quantized import int8_dequantize, int8_embedding, int8_linear


def int8_specs(shape: tuple[int, ...]) -> dict[str, Spec]:
    """What a weight [O, I] is stored as, by the suffix of its name."""
    return {"int8": Spec(shape, "int8"), "scale": Spec(shape[:1], "float32")}


class _Int8(Replay):
    def __init__(self, source: Graph, names: Iterable[str]) -> None:
        super().__init__(source)
        self.names = frozenset(names)
        self.parts: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def visit(self, node: Node) -> None:
        if node.op is INPUT and node.attrs["name"] in self.names:
            (given,), name = node.outputs, node.attrs["name"]
            specs = int8_specs(given.shape).items()
            codes, scale = (self.graph.input(f"{name}.{suffix}", spec.shape, spec.dtype) for suffix, spec in specs)
            self.parts[given] = codes, scale
            return
        weight = node.inputs[1] if node.op in (linear, embedding) else None
        if weight is None or weight not in self.parts:
            self.copy(node)
            return
        first, bias = node.inputs[0], node.inputs[2] if node.op is linear else None
        assert first is not None
        x, parts = self.map[first], self.parts[weight]
        if node.op is linear:
            made = int8_linear(x, *parts, None if bias is None else self.map[bias])
        else:
            made = int8_embedding(x, *parts, dtype=weight.dtype)
        self.map[node.outputs[0]] = made

    def inputs(self, node: Node) -> tuple[Tensor | None, ...]:
        for tensor in node.inputs:
            if tensor in self.parts:
                assert tensor is not None
                self.map[tensor] = int8_dequantize(*self.parts[tensor], dtype=tensor.dtype)
        return super().inputs(node)


def int8(graph: Graph, names: Iterable[str]) -> Graph:
    """The graph whose inputs NAME are stored as NAME.int8 and NAME.scale."""
    return prune(_Int8(graph, names).run())
