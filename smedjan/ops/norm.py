"""Root-mean-square (Zhang & Sennrich 2019, eq. 4) and layer normalisation (Ba et al. 2016, eq. 4), and the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add, add_scalar, cast, mul, rsqrt, scale, square, sub


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
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, weight_cast: str = "before", offset: float = 0.0
) -> tuple[Spec, Spec]:
    """y = x * rstd * (offset + weight),  rstd = (mean(x^2, -1) + eps)^(-1/2)       x [..., D], weight [D] -> y [..., D]

    The mean and the product run in float32. `weight_cast` says when the product is rounded to x's dtype: "before" the
    weight (Llama) or "after" (Gemma, OLMo 2). Saves rstd [...], float32.
    """
    require(not offset or weight_cast == "after", "rms_norm: an offset is added in float32")
    require(weight.shape == x.shape[-1:], f"rms_norm: weight {weight.shape} for x {x.shape}")
    require(weight_cast in ("before", "after"), f"rms_norm: weight_cast {weight_cast!r}")
    return x.like(), Spec(x.shape[:-1], "float32")


@rms_norm.decompose
def _(x, weight, *, eps, weight_cast, offset):
    wide = cast(x, "float32")
    rstd = rsqrt(add_scalar(mean_last(square(wide)), value=eps))
    normed = mul(wide, rstd)
    if weight_cast == "before":
        return mul(weight, cast(normed, x.dtype))
    gain = cast(weight, "float32")
    return cast(mul(normed, add_scalar(gain, value=offset) if offset else gain), x.dtype)


@rms_norm.vjp(takes_acc=(0,))
def _(dys, ins, outs, needs, acc, **attrs):
    return _each(rms_norm_bwd(*ins, outs.saved[0], dys[0], acc[0], needs=needs, **attrs), needs)


def _each(made: Tensor | tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """What a backward op gave, at the places that `needs` names."""
    found = iter(made if isinstance(made, tuple) else (made,))
    return tuple(next(found) if need else None for need in needs)


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
    offset: float,
) -> tuple[Spec, ...]:
    """dx = rstd (g - x rstd^2 mean(g x)) + acc,  g = dy * (offset + weight);  dw = sum over rows of dy * x * rstd

    Gives the gradients that `needs` names, in the inputs' order; `acc` is the cotangent that already waits at x.
    """
    return tuple(spec for spec, need in zip((x.like(), weight.like()), needs, strict=True) if need)


backward_by_decomposition(
    rms_norm_bwd,
    rms_norm,
    lambda x, weight, rstd, dy, acc, *, needs, **attrs: (
        (x, weight),
        attrs,
        (dy,),
        needs,
        (acc, None),
    ),
)


@op(saves=("mean", "rstd"), cost=lambda node: 6 * node.inputs[0].numel)
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, composed: bool = False
) -> tuple[Spec, Spec, Spec]:
    """y = (x - mean) * rstd * weight + bias,  rstd = (mean((x - mean)^2, -1) + eps)^(-1/2)

    x [..., D], weight and bias [D] -> y [..., D]. Runs in float32 and rounds once. transformers computes it in one call
    of torch, or, where it is `composed` (Cohere), in single ones: they differ in rounding alone. Saves mean and
    rstd [...], float32.
    """
    require(weight.shape == x.shape[-1:], f"layer_norm: weight {weight.shape} for x {x.shape}")
    require(not composed or bias is None, "layer_norm: the composed form has no bias")
    return x.like(), Spec(x.shape[:-1], "float32"), Spec(x.shape[:-1], "float32")


@layer_norm.decompose
def _(x, weight, bias, *, eps, composed):
    wide = cast(x, "float32")
    mean = mean_last(wide)
    variance = mean_last(square(sub(wide, mean)))
    normed = mul(sub(wide, mean), rsqrt(add_scalar(variance, value=eps)))
    y = mul(cast(weight, "float32"), normed)
    if bias is not None:
        y = add(y, cast(bias, "float32"))
    return cast(y, x.dtype)


@layer_norm.vjp(takes_acc=(0,))
def _(dys, ins, outs, needs, acc, **attrs):
    return _each(layer_norm_bwd(*ins, *outs.saved, dys[0], acc[0], needs=needs, **attrs), needs)


@op(cost=lambda node: 12 * node.inputs[0].numel)
def layer_norm_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    acc: Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
    eps: float,
    composed: bool,
) -> tuple[Spec, ...]:
    """dx = rstd (g - mean(g) - n mean(g n)) + acc,  g = dy * weight,  n = (x - mean) rstd;  dw = sum dy n;  db = sum dy

    Gives the gradients that `needs` names, in the inputs' order; `acc` is the cotangent that already waits at x.
    """
    return tuple(t.like() for t, need in zip((x, weight, bias), needs, strict=True) if need and t is not None)


backward_by_decomposition(
    layer_norm_bwd,
    layer_norm,
    lambda x, weight, bias, mean, rstd, dy, acc, *, needs, **attrs: (
        (x, weight, bias),
        attrs,
        (dy,),
        needs,
        (acc, None, None),
    ),
)


@op(saves=("rstd",), cost=lambda node: 6 * node.inputs[0].numel)
def add_rms_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    *,
    eps: float,
    weight_cast: str = "before",
    offset: float = 0.0,
    factor: float = 1.0,
) -> tuple[Spec, Spec, Spec]:
    """sum = x + factor * delta,  y = rms_norm(sum)       x, delta [..., D], weight [D] -> sum, y [..., D]

    The sum of a residual stream and a block's output, and the norm that the next block reads: of the sum as it is
    rounded to x's dtype. Saves rstd [...], float32, of the sum.
    """
    require(delta.spec == x.spec, f"add_rms_norm: {delta} beside {x}")
    return x.like(), *rms_norm.rule(x, weight, eps=eps, weight_cast=weight_cast, offset=offset)


@add_rms_norm.decompose
def _(x, delta, weight, *, factor, **attrs):
    total = _total(x, delta, factor)
    y = rms_norm(total, weight, **attrs)
    return total, *y.node.outputs  # what the norm saves is what this op does: a backend may have the norm's backward


@add_rms_norm.vjp
def _(dys, ins, outs, needs, acc, *, factor, **attrs):
    def bwd(dsum, dy, wanted):
        return rms_norm_bwd(outs.public[0], ins[2], outs.saved[0], dy, dsum, needs=wanted, **attrs)

    return _add_norm_bwd(dys, needs, factor, bwd)


@op(saves=("mean", "rstd"), cost=lambda node: 8 * node.inputs[0].numel)
def add_layer_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    composed: bool = False,
    factor: float = 1.0,
) -> tuple[Spec, Spec, Spec, Spec]:
    """sum = x + factor * delta,  y = layer_norm(sum)       x, delta [..., D], weight, bias [D] -> sum, y [..., D]

    The sum is rounded to x's dtype before its norm is taken. Saves mean and rstd [...], float32, of the sum.
    """
    require(delta.spec == x.spec, f"add_layer_norm: {delta} beside {x}")
    return x.like(), *layer_norm.rule(x, weight, bias, eps=eps, composed=composed)


@add_layer_norm.decompose
def _(x, delta, weight, bias, *, factor, **attrs):
    total = _total(x, delta, factor)
    y = layer_norm(total, weight, bias, **attrs)
    return total, *y.node.outputs


@add_layer_norm.vjp
def _(dys, ins, outs, needs, acc, *, factor, **attrs):
    def bwd(dsum, dy, wanted):
        return layer_norm_bwd(outs.public[0], *ins[2:], *outs.saved, dy, dsum, needs=wanted, **attrs)

    return _add_norm_bwd(dys, needs, factor, bwd)


def _total(x: Tensor, delta: Tensor, factor: float) -> Tensor:
    return add(x, delta if factor == 1.0 else scale(delta, factor=factor))


def _add_norm_bwd(
    dys: Sequence[Tensor | None],
    needs: tuple[bool, ...],
    factor: float,
    bwd: Callable[[Tensor | None, Tensor, tuple[bool, ...]], Tensor | tuple[Tensor, ...]],
) -> tuple[Tensor | None, ...]:
    """Cotangents of x, delta and the norm's parameters: the sum's own one is what waits at the norm's input."""
    dsum, dy = dys
    wanted = (needs[0] or needs[1], *needs[2:])
    made: tuple[Tensor | None, ...] = (dsum, *(None,) * len(wanted[1:]))
    if dy is not None:
        made = _each(bwd(dsum if wanted[0] else None, dy, wanted), wanted)
    d, *rest = made
    ddelta = d if d is None or factor == 1.0 or not needs[1] else scale(d, factor=factor)
    return d if needs[0] else None, ddelta if needs[1] else None, *rest
