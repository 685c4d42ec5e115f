"""Gated linear units (Shazeer 2020, eq. 6)."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.activation import ACTIVATIONS, activation
from smedjan.ops.elementwise import mul


@op(cost=lambda node: 5 * node.inputs[0].numel)
def glu(gate: Tensor, up: Tensor, *, act: str = "silu") -> Spec:
    """y = act(gate) * up       gate, up [..., I] -> y [..., I]. act(gate) is rounded to gate's dtype first."""
    require(gate.shape == up.shape, f"glu: gate {gate.shape}, up {up.shape}")
    require(act in ACTIVATIONS, f"glu: act {act!r}")
    return gate.like()


@glu.decompose
def _(gate, up, *, act):
    return mul(activation(gate, act), up)


@glu.vjp
def _(dys, ins, outs, needs, acc, *, act):
    made = glu_bwd(*ins, dys[0], needs=needs, act=act)
    made = iter(made if isinstance(made, tuple) else (made,))
    return tuple(next(made) if need else None for need in needs)


@op(cost=lambda node: 10 * node.inputs[0].numel)
def glu_bwd(gate: Tensor, up: Tensor, dy: Tensor, *, needs: tuple[bool, bool], act: str) -> tuple[Spec, ...]:
    """dgate = dy * up * act'(gate);  dup = dy * act(gate). Gives what `needs` names, in order."""
    return tuple(t.like() for t, need in zip((gate, up), needs, strict=True) if need)


backward_by_decomposition(
    glu_bwd,
    glu,
    lambda gate, up, dy, *, needs, act: ((gate, up), {"act": act}, (dy,), needs, (None, None)),
)
