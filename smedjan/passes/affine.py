"""Weights in MLX's affine format as graph passes: a parameter becomes its codes, scales and biases.

    NAME [O, I]  ->  NAME.affine uint32 [O, I * bits / 32], NAME.scales and NAME.biases [O, I / group_size]

`affine` comes first and leaves a weight that is made for each reader (`Op.remade`), which adapters find; `read_codes`
comes behind them, for backends whose products read the codes themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.rewrite import Replay, prune
from smedjan.graph.tensor import Tensor
from smedjan.ops.elementwise import add, cast, scale
from smedjan.ops.embedding import embedding
from smedjan.ops.linear import linear
from smedjan.ops.lora import lora_linear
from smedjan.ops.quantized import Affine, affine_dequantize, affine_embedding, affine_linear


class _Affine(Replay):
    def __init__(self, source: Graph, held: Mapping[str, Affine]) -> None:
        super().__init__(source)
        self.held = held
        self.parts: dict[Tensor, tuple[tuple[Tensor, ...], Affine]] = {}

    def visit(self, node: Node) -> None:
        if node.op is INPUT and node.attrs["name"] in self.held:
            (weight,), name = node.outputs, node.attrs["name"]
            specs = self.held[name].specs(weight.shape, weight.dtype).items()
            parts = tuple(self.graph.input(f"{name}.{suffix}", spec.shape, spec.dtype) for suffix, spec in specs)
            self.parts[weight] = parts, self.held[name]
            return
        table = node.inputs[1] if node.op is embedding else None
        if table is None or table not in self.parts:
            self.copy(node)
            return
        ids, (parts, held) = node.inputs[0], self.parts[table]
        assert ids is not None
        self.map[node.outputs[0]] = affine_embedding(self.map[ids], *parts, **vars(held))

    def inputs(self, node: Node) -> tuple[Tensor | None, ...]:
        for tensor in node.inputs:
            if tensor in self.parts:
                assert tensor is not None
                parts, held = self.parts[tensor]
                self.map[tensor] = affine_dequantize(*parts, **vars(held))
        return super().inputs(node)


def affine(graph: Graph, held: Mapping[str, Affine]) -> Graph:
    """The graph whose inputs NAME are stored as NAME.affine, NAME.scales and NAME.biases."""
    return prune(_Affine(graph, held).run())


class _ReadCodes(Replay):
    def visit(self, node: Node) -> None:
        weight = node.inputs[1] if node.op in (linear, lora_linear) else None
        if weight is None or weight.node.op is not affine_dequantize:
            self.copy(node)
            return
        x, _weight, bias, *adapters = self.inputs(node)
        assert x is not None
        parts = (self.map[part] for part in weight.node.inputs if part is not None)
        y = affine_linear(x, *parts, bias, **weight.node.attrs)
        if adapters:
            low = scale(linear(linear(cast(x, "float32"), adapters[0]), adapters[1]), factor=node.attrs["scaling"])
            y = cast(add(cast(y, "float32"), low), y.dtype)
        self.map[node.outputs[0]] = y


def read_codes(graph: Graph) -> Graph:
    """Linear layers read their codes themselves, those with adapters in the parts that `lora_linear` decomposes to."""
    return prune(_ReadCodes(graph).run())
