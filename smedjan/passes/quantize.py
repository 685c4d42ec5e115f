"""Weights of 4 or 8 bits as graph passes (Dettmers et al. 2023, "QLoRA", eq. 5): a parameter becomes what it is stored
as.

`quantize` comes first: adapters are put beside what it leaves of a linear layer. The weight it dequantises is made for
each reader, and for its gradient once more (`Op.remade`), so that no two of them need be in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.rewrite import Replay
from smedjan.graph.tensor import Tensor
from smedjan.ops.linear import linear
from smedjan.ops.quantized import STORED, dequantize, int8_dequantize, int8_linear, nf4_dequantize, nf4_linear


class _Quantize(Replay):
    def __init__(self, source: Graph, names: Iterable[str], storage: str) -> None:
        super().__init__(source)
        self.names, self.storage = frozenset(names), storage
        self.parts: dict[Tensor, tuple[Tensor, ...]] = {}

    def visit(self, node: Node) -> None:
        if node.op is not INPUT or node.attrs["name"] not in self.names:
            self.copy(node)
            return
        (weight,), name = node.outputs, node.attrs["name"]
        self.parts[weight] = tuple(
            self.graph.input(f"{name}.{suffix}", spec.shape, spec.dtype)
            for suffix, spec in STORED[self.storage](weight.shape).items()
        )

    def inputs(self, node: Node) -> tuple[Tensor | None, ...]:
        for tensor in node.inputs:
            if tensor in self.parts:
                assert tensor is not None
                parts = self.parts[tensor]
                self.map[tensor] = dequantize(self.storage, parts, shape=tensor.shape, dtype=tensor.dtype)
        return super().inputs(node)


def quantize(graph: Graph, names: Iterable[str], storage: str = "nf4") -> Graph:
    """The graph whose inputs NAME are stored as NAME.nf4, NAME.absmax, NAME.nested_absmax and NAME.offset, or as
    NAME.int8 and NAME.scale."""
    return _Quantize(graph, names, storage).run()


class _Fuse(Replay):
    def visit(self, node: Node) -> None:
        weight = node.inputs[1] if node.op is linear else None
        if weight is None or weight.node.op not in (nf4_dequantize, int8_dequantize):
            self.copy(node)
            return
        x, _weight, bias = self.inputs(node)
        parts = (self.map[part] for part in weight.node.inputs if part is not None)
        if weight.node.op is int8_dequantize:
            self.map[node.outputs[0]] = int8_linear(x, *parts, bias)
        else:
            self.map[node.outputs[0]] = nf4_linear(x, *parts, bias, shape=weight.shape)


def fuse(graph: Graph) -> Graph:
    """Linear layers that read their few bits themselves, where no gradient asks for the weight: for decoding."""
    return _Fuse(graph).run()
