"""Low-rank adapters (Hu et al. 2022, eq. 3) as a graph pass: y = W x + s B A dropout(x), s = alpha / rank, or, rank-
stabilized (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA"), alpha / sqrt(rank).

DoRA (Liu et al. 2024, eq. 5) learns the length of each row apart from its direction: y = (m / |W + s B A|) (W x + s B A
x) with the magnitude m [out], the norm held constant.

The base product is emitted before the adapter's, as PEFT computes it: creation order is what makes the gradients equal
to the bit. Adapters are float32 beside weights of any dtype; x is widened for them and the sum is rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.rewrite import Replay
from smedjan.graph.tensor import Tensor
from smedjan.ops.elementwise import add, add_scalar, cast, div, mul, reshape, scale, sub
from smedjan.ops.linear import conv1d, linear, transpose_last
from smedjan.ops.lora import dora_norm, lora_linear
from smedjan.ops.quantized import STORED, affine_dequantize, int8_dequantize, nf4_dequantize
from smedjan.ops.random import dropout

DTYPE = "float32"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """rank r, alpha, dropout p, and the last parts of the names of the modules that get an adapter.

    `layers` limits them to blocks of these numbers (PEFT's layers_to_transform); below the lowest, nothing is
    differentiated. `transposed`: the base's weights are [in, out], as GPT-2 has them (PEFT's fan_in_fan_out).

    `ranks` and `alphas` are other values for modules of some names (PEFT's rank_pattern, alpha_pattern), the first that
    matches; `rslora` scales by alpha / sqrt(rank). `dora` gives each module a magnitude.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    transposed: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    rslora: bool = False
    dora: bool = False

    def rank_of(self, module: str) -> int:
        return next((rank for name, rank in self.ranks if is_named(module, name)), self.rank)

    def scaling_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = next((alpha for name, alpha in self.alphas if is_named(module, name)), self.alpha)
        return alpha / (sqrt(rank) if self.rslora else rank)

    def matches(self, module: str) -> bool:
        """PEFT's rule for a list: the module's name is a target or ends in `.target`."""
        if self.layers is not None:
            block = re.search(r"\.(?:layers|h)\.(\d+)\.", module)
            if block is not None and int(block.group(1)) not in self.layers:
                return False  # a module outside the blocks is not limited, as in PEFT
        return any(is_named(module, target) for target in self.targets)

    def shapes(self, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Adapter parameters by PEFT's names, in module order: A [r, in], B [out, r], DoRA's m [out] of each target."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in parameters.items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and len(shape) == 2 and self.matches(module):
                outside, inside = shape[::-1] if self.transposed else shape
                rank = self.rank_of(module)
                found[a_name(module)] = (rank, inside)
                found[b_name(module)] = (outside, rank)
                if self.dora:
                    found[magnitude_name(module)] = (outside,)
        return found


def is_named(module: str, name: str) -> bool:
    """Whether `name` is the module's whole name or the end of it, in whole parts."""
    return module == name or module.endswith(f".{name}")


def a_name(module: str) -> str:
    return f"base_model.model.{module}.lora_A.weight"


def b_name(module: str) -> str:
    return f"base_model.model.{module}.lora_B.weight"


def magnitude_name(module: str) -> str:
    return f"base_model.model.{module}.lora_magnitude_vector"


def factor_name(module: str) -> str:
    """Of m / |W + s B A| [out], where it is computed once for many programs' runs."""
    return f"base_model.model.{module}.lora_factor"


def module_of(name: str) -> str:
    """The module that an adapter's parameter belongs to."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


class _Adapt(Replay):
    def __init__(self, source: Graph, lora: Lora, exact: bool, factors: bool) -> None:
        super().__init__(source)
        self.lora, self.exact, self.factors = lora, exact, factors
        self.sites = 0

    def visit(self, node: Node) -> None:
        module = _module(node)
        if module is None or not self.lora.matches(module):
            self.copy(node)
            return
        lora = self.lora
        x, weight, bias = self.inputs(node)
        assert x is not None
        assert weight is not None
        base_op = linear if node.op is linear else conv1d
        outside, inside = weight.shape if base_op is linear else weight.shape[::-1]
        rank, scaling = lora.rank_of(module), lora.scaling_of(module)
        a = self.graph.input(a_name(module), (rank, inside), DTYPE)
        b = self.graph.input(b_name(module), (outside, rank), DTYPE)
        fused = lora.dropout == 0 and base_op is linear
        if lora.dora:
            if self.factors:
                factor = self.graph.input(factor_name(module), (outside,), DTYPE)
            else:
                magnitude = self.graph.input(magnitude_name(module), (outside,), DTYPE)
                factor = div(magnitude, dora_norm(_rows(node, _again(weight)), a, b, scaling=scaling))
            if fused and not self.exact:
                self.map[node.outputs[0]] = _stretched(
                    lora_linear(x, weight, None, a, b, scaling=scaling), factor, bias
                )
                return
        elif fused:
            self.map[node.outputs[0]] = lora_linear(x, weight, bias, a, b, scaling=scaling)
            return
        base = base_op(x, weight, bias)
        dropped = cast(x, DTYPE)
        if lora.dropout:
            dropped = dropout(dropped, self._key(), p=lora.dropout, site=self.sites)
        self.sites += 1
        low = linear(linear(dropped, a), b)
        if lora.dora:
            plain = base if bias is None else sub(base, bias)
            if lora.dropout:  # what the direction is measured on is dropped too
                plain = linear(dropped, cast(_rows(node, _again(weight)), DTYPE))
            factor = reshape(factor, shape=(1, outside))
            turned = mul(add_scalar(factor, value=-1.0), cast(plain, DTYPE))
            low = add(turned, scale(mul(factor, low), factor=scaling))
        else:
            low = scale(low, factor=scaling)
        self.map[node.outputs[0]] = cast(add(cast(base, DTYPE), low), base.dtype)

    def _key(self) -> Tensor:
        return self.graph.inputs.get("dropout_key") or self.graph.input("dropout_key", (4,), "int64")


def _again(weight: Tensor) -> Tensor:
    """The weight, or the same one made once more for another reader (`Op.remade`)."""
    node = weight.node
    return node.op(*node.inputs, **node.attrs) if node.op.remade else weight


def _rows(node: Node, weight: Tensor) -> Tensor:
    """[out, in]"""
    return weight if node.op is linear else transpose_last(weight)


def _stretched(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """factor * y + bias, rounded once       y [..., O], factor [O] float32"""
    wide = mul(cast(y, DTYPE), factor)
    return cast(wide if bias is None else add(wide, cast(bias, DTYPE)), y.dtype)


def _module(node: Node) -> str | None:
    weight = node.inputs[1] if node.op in (linear, conv1d) else None
    if weight is not None and weight.node.op in (nf4_dequantize, int8_dequantize, affine_dequantize):
        weight = weight.node.inputs[0]
    if weight is None or weight.node.op is not INPUT:
        return None
    name = str(weight.node.attrs["name"])
    for storage in (*STORED, "affine"):
        name = name.removesuffix(f".{storage}")
    return name.removesuffix(".weight")


def adapt(graph: Graph, lora: Lora, *, exact: bool = True, factors: bool = False) -> Graph:
    """The forward graph with an adapter beside every targeted linear; apply before `grad`.

    exact    DoRA in the order of `peft`, which adds what it changes to y; else fewer products, in the ops that plain
             adapters have
    factors  DoRA's m / |W + s B A| are inputs (`factor_name`)
    """
    return _Adapt(graph, lora, exact, factors).run()
