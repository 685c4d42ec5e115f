"""Ops: declared once, with their mathematics, shape rule, cost, decomposition and VJP.

    @op(cost=..., saves=("rstd",))
    def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> ...:
        '''y = x * rsqrt(mean(x^2) + eps) * weight'''
        return x.like(), Spec(x.shape[:-1], "float32")      # public outputs, then the saved ones

    @rms_norm.decompose
    def _(x, weight, *, eps): ...                           # the definition, in smaller ops

    @rms_norm.vjp(takes_acc=(0,))
    def _(dys, ins, outs, needs, acc, *, eps): ...          # cotangents of the inputs

Positional parameters are tensors (None where optional), keyword-only ones attributes. An attribute is hashable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smedjan.errors import ShapeError
from smedjan.graph.tensor import Spec, Tensor

if TYPE_CHECKING:
    from smedjan.graph.node import Node


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs (a multiply-add is two) and bytes that must move at least once."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Outs:
    """A node's outputs as its VJP sees them."""

    public: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]


Cotangents = Sequence[Tensor | None]

Pairs = tuple[tuple[int, int], ...]
"""(output, input) by their numbers."""

Donates = int | Callable[..., Pairs]
"""The input whose buffer the first output takes over, or node -> each output that takes one over, with its input."""


@dataclass(eq=False)
class Op:
    """An op's declaration. Calling it inside a graph appends a node and returns its public output(s)."""

    name: str
    rule: Callable[..., Spec | tuple[Spec, ...]]
    cost_rule: Callable[[Node], int] | None = None
    saves: tuple[str, ...] = ()
    donates: Donates | None = None
    pure: bool = True
    remade: bool = False
    decomposition: Callable[..., Any] | None = None
    vjp_rule: Callable[..., Cotangents] | None = None
    takes_acc: tuple[int, ...] = ()
    doc: str = ""
    parameters: tuple[str, ...] = field(default=(), repr=False)
    variadic: bool = False

    def __call__(self, *inputs: Tensor | None, **attrs: Any) -> Any:
        if not self.variadic and len(inputs) < len(self.parameters):
            inputs = inputs + (None,) * (len(self.parameters) - len(inputs))
        graph = attrs.pop("graph", None) or next(t.graph for t in inputs if t is not None)
        specs = self.rule(*inputs, **attrs)
        if isinstance(specs, Spec):
            specs = (specs,)
        outputs = graph.add(self, inputs, self._bound(attrs), specs)
        public = outputs[: len(outputs) - len(self.saves)]
        return public[0] if len(public) == 1 else public

    def _bound(self, attrs: dict[str, Any]) -> dict[str, Any]:
        """Attributes with the declaration's defaults filled in, so that equal nodes have equal attributes."""
        return {**self._defaults, **attrs}

    @property
    def _defaults(self) -> dict[str, Any]:
        cached = _DEFAULTS.get(self.name)
        if cached is None:
            kinds = inspect.signature(self.rule).parameters.values()
            cached = {p.name: p.default for p in kinds if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
            _DEFAULTS[self.name] = cached
        return cached

    def decompose(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Declares the op's definition in smaller ops: its public outputs from its inputs and attributes."""
        self.decomposition = function
        return function

    def vjp(
        self, function: Callable[..., Cotangents] | None = None, *, takes_acc: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Declares the op's VJP. `takes_acc` lists the inputs whose waiting cotangent the rule adds itself."""

        def register(rule: Callable[..., Cotangents]) -> Callable[..., Cotangents]:
            self.vjp_rule, self.takes_acc = rule, takes_acc
            return rule

        return register(function) if function is not None else register

    def donated(self, node: Node) -> Pairs:
        """(output, input) of each buffer that `node` updates."""
        if self.donates is None:
            return ()
        return self.donates(node) if callable(self.donates) else ((0, self.donates),)

    def cost(self, node: Node) -> Cost:
        """By default one FLOP an output element; bytes are always every input and output once."""
        moved = sum(t.nbytes for t in node.inputs if t is not None) + sum(t.nbytes for t in node.outputs)
        flops = self.cost_rule(node) if self.cost_rule else sum(t.numel for t in node.outputs)
        return Cost(flops, moved)

    def __repr__(self) -> str:
        return f"Op({self.name})"


_DEFAULTS: dict[str, dict[str, Any]] = {}
OPS: dict[str, Op] = {}
"""Every declared op by name."""


def op(
    rule: Callable[..., Any] | None = None,
    *,
    cost: Callable[[Any], int] | None = None,
    saves: tuple[str, ...] = (),
    donates: Donates | None = None,
    pure: bool = True,
    remade: bool = False,
) -> Any:
    """Declares an op from its shape rule (see the module's example).

    cost     node -> FLOPs
    saves    names of the trailing outputs that exist for the VJP alone
    donates  the input whose buffer the first output takes over (in place on torch, a fresh array on MLX), or
             node -> (output, input) pairs
    pure     False for ops that CSE must not merge
    remade   a gradient that reads the result makes it again: it is large, and cheap to make from what is kept anyway
    """

    def declare(function: Callable[..., Any]) -> Op:
        parameters = inspect.signature(function).parameters.values()
        declared = Op(
            name=function.__name__,
            rule=function,
            cost_rule=cost,
            saves=saves,
            donates=donates,
            pure=pure and donates is None and not remade,
            remade=remade,
            doc=inspect.getdoc(function) or "",
            parameters=tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
            variadic=any(p.kind is p.VAR_POSITIONAL for p in parameters),
        )
        assert declared.name not in OPS, f"op {declared.name} declared twice"
        OPS[declared.name] = declared
        return declared

    return declare(rule) if rule is not None else declare


def require(condition: bool, message: str) -> None:
    """A shape rule's check: ShapeError with the message when the inputs do not fit."""
    if not condition:
        raise ShapeError(message)
