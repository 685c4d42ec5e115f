"""A linear layer with a low-rank adapter beside it (Hu et al. 2022, eq. 3), as one op for backends that fuse it."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add, cast, scale
from smedjan.ops.linear import bias_grad, linear, linear_dw


def _flops(node) -> int:
    x, weight, _bias, a, b = node.inputs
    rows = x.numel // x.shape[-1]
    return 2 * rows * (weight.numel + a.numel + b.numel)


@op(saves=("low",), cost=_flops)
def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, scaling: float
) -> tuple[Spec, Spec]:
    """y = x W^T + bias + s (x A^T) B^T       x [..., I], W [O, I], A [r, I], B [O, r] -> y [..., O]

    Adapters are float32: x is widened for them, and the sum of both products rounded once. Saves low = x A^T [..., r].
    """
    require(weight.shape == (b.shape[0], a.shape[1]), f"lora_linear: W {weight.shape}, A {a.shape}, B {b.shape}")
    require(a.shape[0] == b.shape[1], f"lora_linear: A {a.shape}, B {b.shape}")
    require(a.dtype == b.dtype == "float32", f"lora_linear: A is {a.dtype}, B {b.dtype}")
    return x.like(shape=(*x.shape[:-1], weight.shape[0])), Spec((*x.shape[:-1], a.shape[0]), "float32")


@lora_linear.decompose
def _(x, weight, bias, a, b, *, scaling):
    base = linear(x, weight, bias)  # before the adapter, as PEFT computes it: creation order decides the bits
    low = scale(linear(linear(cast(x, "float32"), a), b), factor=scaling)
    return cast(add(cast(base, "float32"), low), base.dtype)


@lora_linear.vjp(takes_acc=(0,))
def _(dys, ins, outs, needs, acc, *, scaling):
    x, weight, _bias, a, b = ins
    wanted = (needs[0], needs[3], needs[4])
    made = lora_linear_bwd(dys[0], x, weight, a, b, outs.saved[0], acc[0], needs=wanted, scaling=scaling)
    found = iter(made if isinstance(made, tuple) else (made,))
    dx, da, db = (next(found) if want else None for want in wanted)
    return (
        dx,
        linear_dw(dys[0], x) if needs[1] else None,
        bias_grad(dys[0]) if needs[2] else None,
        da,
        db,
    )


def _backward_flops(node) -> int:
    _dy, x, weight, a, b = node.inputs[:5]
    rows = x.numel // x.shape[-1]
    return 2 * rows * ((weight.numel if node.attrs["needs"][0] else 0) + 2 * a.numel + 2 * b.numel)


@op(cost=_backward_flops)
def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    low: Tensor,
    acc: Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
    scaling: float,
) -> tuple[Spec, ...]:
    """g = s dy B;  dx = dy W + g A + acc;  dA = g^T x;  dB = s dy^T low. Gives what `needs` names of dx, dA, dB."""
    return tuple(t.like() for t, need in zip((x, a, b), needs, strict=True) if need)


backward_by_decomposition(
    lora_linear_bwd,
    lora_linear,
    lambda dy, x, weight, a, b, low, acc, *, needs, scaling: (
        (x, weight, None, a, b),
        {"scaling": scaling},
        (dy,),
        (needs[0], False, False, needs[1], needs[2]),
        (acc, None, None, None, None),
    ),
)
