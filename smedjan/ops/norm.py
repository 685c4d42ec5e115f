"""Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4) and the mean it is made of."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add_scalar, cast, mul, rsqrt, square


@op
def mean_last(x: Tensor) -> Spec:
    """y = mean of x over its last dim, kept as 1.       x [..., D] -> y [..., 1]"""
    return x.like(shape=(*x.shape[:-1], 1))


@mean_last.vjp
def _(dys, ins, outs, needs, acc):
    return (mean_last_bwd(dys[0], size=ins[0].shape[-1]),)


@op
def mean_last_bwd(dy: Tensor, *, size: int) -> Spec:
    """dx = dy / D, widened to D columns.       dy [..., 1] -> dx [..., D]"""
    return dy.like(shape=(*dy.shape[:-1], size))


@op(saves=("rstd",), cost=lambda node: 4 * node.inputs[0].numel)
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_cast: str = "before") -> tuple[Spec, Spec]:
    """y = round(x * rstd) * weight,  rstd = (mean(x^2, -1) + eps)^(-1/2)       x [..., D], weight [D] -> y [..., D]

    The mean and the product run in float32. `weight_cast` says when the product is rounded to x's dtype: "before" the
    weight (Llama) or "after" (Gemma). Saves rstd [...], float32.
    """
    require(weight.shape == x.shape[-1:], f"rms_norm: weight {weight.shape} for x {x.shape}")
    require(weight_cast in ("before", "after"), f"rms_norm: weight_cast {weight_cast!r}")
    return x.like(), Spec(x.shape[:-1], "float32")


@rms_norm.decompose
def _(x, weight, *, eps, weight_cast):
    wide = cast(x, "float32")
    rstd = rsqrt(add_scalar(mean_last(square(wide)), value=eps))
    normed = mul(wide, rstd)
    if weight_cast == "before":
        return mul(weight, cast(normed, x.dtype))
    return cast(mul(cast(weight, "float32"), normed), x.dtype)


@rms_norm.vjp(takes_acc=(0,))
def _(dys, ins, outs, needs, acc, *, eps, weight_cast):
    made = rms_norm_bwd(*ins, outs.saved[0], dys[0], acc[0], needs=needs, eps=eps, weight_cast=weight_cast)
    made = iter(made if isinstance(made, tuple) else (made,))
    return tuple(next(made) if need else None for need in needs)


@op(cost=lambda node: 8 * node.inputs[0].numel)
def rms_norm_bwd(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dy: Tensor,
    acc: Tensor | None,
    *,
    needs: tuple[bool, bool],
    eps: float,
    weight_cast: str,
) -> tuple[Spec, ...]:
    """dx = rstd (g - x rstd^2 mean(g x)) + acc,  g = dy * weight;  dw = sum over rows of dy * x * rstd

    Gives the gradients that `needs` names, in the inputs' order; `acc` is the cotangent that already waits at x.
    """
    return tuple(spec for spec, need in zip((x.like(), weight.like()), needs, strict=True) if need)


backward_by_decomposition(
    rms_norm_bwd,
    rms_norm,
    lambda x, weight, rstd, dy, acc, *, needs, eps, weight_cast: (
        (x, weight),
        {"eps": eps, "weight_cast": weight_cast},
        (dy,),
        needs,
        (acc, None),
    ),
)
