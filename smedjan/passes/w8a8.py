"""The forward product of frozen linear layers in 8-bit integers, where it is asked for: codes beside each weight.

NAME [O, I]  ->  NAME, which the gradient reads, and NAME.int8 int8 [O, I], NAME.scale float32 [O]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.rewrite import Replay
from smedjan.graph.tensor import Tensor
from smedjan.ops.linear import linear, linear_group, members
from smedjan.ops.lora import group_parts, lora_linear, lora_linear_group
from smedjan.ops.quantized import int8_specs
from smedjan.ops.w8a8 import w8a8_linear, w8a8_lora_linear

TAKEN = (linear, linear_group, lora_linear, lora_linear_group)


class _W8A8(Replay):
    def __init__(self, source: Graph, names: Iterable[str]) -> None:
        super().__init__(source)
        self.names = frozenset(names)
        self.parts: dict[str, tuple[Tensor, ...]] = {}

    def visit(self, node: Node) -> None:
        if node.op not in TAKEN:
            self.copy(node)
            return
        x, *tensors = (tensor for tensor in self.inputs(node) if tensor is not None)
        weights, biases, a, b = _parted(node, tensors)
        if any(weight.node.op is not INPUT or weight.node.attrs["name"] not in self.names for weight in weights):
            self.copy(node)
            return
        given, biased = (x, *weights, *self._codes(weights), *biases), bool(biases)
        if a:
            adapted, scaling = node.attrs.get("adapted", (True,)), node.attrs["scaling"]
            y = w8a8_lora_linear(*given, *a, *b, adapted=adapted, biased=biased, scaling=scaling)
        else:
            y = w8a8_linear(*given, biased=biased)
        self.map[node.outputs[0]] = y

    def _codes(self, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All codes, then all scales."""
        for weight in weights:
            name = weight.node.attrs["name"]
            if name not in self.parts:
                specs = int8_specs(weight.shape).items()
                self.parts[name] = tuple(self.graph.input(f"{name}.{end}", s.shape, s.dtype) for end, s in specs)
        found = [self.parts[weight.node.attrs["name"]] for weight in weights]
        return (*(codes for codes, _ in found), *(scale for _, scale in found))


def _parted(node: Node, tensors: list[Tensor]) -> tuple[list[Tensor], ...]:
    """(weights, biases, As, Bs) of the tensors that a node has besides x."""
    if node.op is linear:
        return tensors[:1], tensors[1:], [], []
    if node.op is lora_linear:
        return tensors[:1], tensors[1:-2], tensors[-2:-1], tensors[-1:]
    if node.op is lora_linear_group:
        return group_parts(tensors, node.attrs["adapted"], node.attrs["biased"])
    biased = node.attrs["biased"]
    weights, biases = members(tuple(tensors), biased)
    return list(weights), [bias for bias in biases if bias is not None], [], []


def w8a8(graph: Graph, names: Iterable[str]) -> Graph:
    """The forward graph with the products of every linear layer over the parameters of these names in 8-bit integers,
    alone or with an adapter, one or several of one input. Apply after fusion and before `grad`."""
    names = tuple(names)
    return _W8A8(graph, names).run() if names else graph
