"""Linear layers with low-rank adapters beside them (Hu et al. 2022, eq. 3), as ops for backends that fuse them: one
layer, and several of one input (q, k and v; gate and up). And the norms that DoRA divides by (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TypeVar

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add, cast, mul, reshape, rsqrt, scale, square, sum_to
from smedjan.ops.linear import bias_grad, linear, linear_dw, linear_dx
from smedjan.ops.shape import concat, narrow

T = TypeVar("T")


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


def group_parts(tensors: Sequence[T], adapted: tuple[bool, ...], biased: bool) -> tuple[list[T], ...]:
    """(weights, biases, As, Bs) of a group's tensors in their order."""
    members, adapters = len(adapted), sum(adapted)
    sizes = (members, members * biased, adapters, adapters)
    require(len(tensors) == sum(sizes), f"lora_linear_group: {len(tensors)} tensors for {sizes}")
    ends = list(accumulate(sizes))
    return tuple(list(tensors[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def per_member(found: Iterable[T], adapted: tuple[bool, ...]) -> list[T | None]:
    """One of `found` for each member with an adapter, None for the others."""
    left = iter(found)
    return [next(left) if has else None for has in adapted]


def _group_flops(node) -> int:
    x, *tensors = node.inputs
    weights, _, adapters, expanding = group_parts(tensors, node.attrs["adapted"], node.attrs["biased"])
    return 2 * (x.numel // x.shape[-1]) * sum(t.numel for t in (*weights, *adapters, *expanding))


@op(saves=("low",), cost=_group_flops)
def lora_linear_group(
    x: Tensor,
    *tensors: Tensor,
    adapted: tuple[bool, ...],
    biased: bool,
    scaling: float,
    together: bool = True,
) -> tuple[Spec, Spec]:
    """y = concat over i of x W_i^T + bias_i + s (x A_i^T) B_i^T: linear layers of one input, with adapters or without

    tensors: all weights [O_i, I]; where `biased`, all biases [O_i]; then A_i [r, I] and, after those, B_i [O_i, r] of
    the members that are `adapted`. x [..., I] -> y [..., sum of O_i]; saves low = x A^T [..., r * adapters] float32.
    `together` says that the weights are parameters, which a backend may move one behind another: dequantised ones lie
    where they were made. Dtypes and roundings are `lora_linear`'s.
    """
    weights, biases, adapters, expanding = group_parts(tensors, adapted, biased)
    require(any(adapted), "lora_linear_group: no member has an adapter, use linear_group")
    for weight, a, b in zip(weights, per_member(adapters, adapted), per_member(expanding, adapted), strict=True):
        fits = weight.ndim == 2 and weight.shape[1] == x.shape[-1] and weight.dtype == x.dtype
        require(fits, f"lora_linear_group: W {weight.shape} {weight.dtype} for x {x.shape} {x.dtype}")
        if a is not None and b is not None:
            fits = a.shape == (adapters[0].shape[0], weight.shape[1]) and b.shape == (weight.shape[0], a.shape[0])
            require(fits, f"lora_linear_group: W {weight.shape}, A {a.shape}, B {b.shape}, rank {adapters[0].shape[0]}")
            require(a.dtype == b.dtype == "float32", f"lora_linear_group: A is {a.dtype}, B {b.dtype}")
    for weight, bias in zip(weights, biases, strict=False):
        require(bias.shape == weight.shape[:1], f"lora_linear_group: W {weight.shape}, bias {bias.shape}")
    rows = x.shape[:-1]
    ranks = sum(a.shape[0] for a in adapters)
    return x.like(shape=(*rows, sum(weight.shape[0] for weight in weights))), Spec((*rows, ranks), "float32")


@lora_linear_group.decompose
def _(x, *tensors, adapted, biased, scaling, together):
    weights, biases, adapters, expanding = group_parts(tensors, adapted, biased)
    members = zip(
        weights,
        biases or [None] * len(weights),
        per_member(adapters, adapted),
        per_member(expanding, adapted),
        strict=True,
    )
    made = [
        linear(x, weight, bias) if a is None else lora_linear(x, weight, bias, a, b, scaling=scaling)
        for weight, bias, a, b in members
    ]
    return made[0] if len(made) == 1 else concat(*made, dim=-1)


@lora_linear_group.vjp(takes_acc=(0,))
def _(dys, ins, outs, needs, acc, *, adapted, biased, scaling, together):
    x, *tensors = ins
    weights, biases, adapters, expanding = group_parts(tensors, adapted, biased)
    frozen = len(weights) + len(biases)
    wanted = (needs[0], any(needs[1 + frozen :]))
    found: list[Tensor | None] = []
    if any(wanted):
        made = lora_linear_group_bwd(
            dys[0],
            x,
            outs.saved[0],
            acc[0],
            *weights,
            *adapters,
            *expanding,
            adapted=adapted,
            needs=wanted,
            scaling=scaling,
            together=together,
        )
        found = list(made) if isinstance(made, tuple) else [made]
    dx = found.pop(0) if wanted[0] else None
    ends = list(accumulate(weight.shape[0] for weight in weights))

    def piece(index: int) -> Tensor:
        size = weights[index].shape[0]
        return narrow(dys[0], dim=dys[0].ndim - 1, start=ends[index] - size, size=size)

    dweights = [linear_dw(piece(i), x) if need else None for i, need in enumerate(needs[1 : 1 + len(weights)])]
    dbiases = [bias_grad(piece(i)) if need else None for i, need in enumerate(needs[1 + len(weights) : 1 + frozen])]
    return (dx, *dweights, *dbiases, *(found if wanted[1] else [None] * (2 * len(adapters))))


def _group_backward_flops(node) -> int:
    _dy, x, _low, _acc, *tensors = node.inputs
    weights, _, adapters, expanding = group_parts(tensors, node.attrs["adapted"], False)
    need_x, need_adapters = node.attrs["needs"]
    base = sum(weight.numel for weight in weights) + sum(a.numel for a in adapters) if need_x else 0
    grads = sum(a.numel for a in adapters) + sum(b.numel for b in expanding) if need_adapters else 0
    return 2 * (x.numel // x.shape[-1]) * (base + sum(b.numel for b in expanding) + grads)


@op(cost=_group_backward_flops)
def lora_linear_group_bwd(
    dy: Tensor,
    x: Tensor,
    low: Tensor,
    acc: Tensor | None,
    *tensors: Tensor,
    adapted: tuple[bool, ...],
    needs: tuple[bool, bool],
    scaling: float,
    together: bool = True,
) -> tuple[Spec, ...]:
    """g_i = s dy_i B_i;  dx = sum of dy_i W_i + sum of g_i A_i + acc;  dA_i = g_i^T x;  dB_i = s dy_i^T low_i

    dy [..., sum of O_i]; tensors: all W_i, then A_i and B_i of the adapted members. `needs`: dx; all dA_i and all dB_i.
    """
    weights, _, adapters, expanding = group_parts(tensors, adapted, False)
    require(dy.shape[-1] == sum(weight.shape[0] for weight in weights), f"lora_linear_group_bwd: dy {dy.shape}")
    dx = (x.like(),) if needs[0] else ()
    return dx + tuple(t.like() for t in (*adapters, *expanding) if needs[1])


def _group_forward(dy, x, low, acc, *tensors, adapted, needs, scaling, together):
    members, parameters = len(adapted), 2 * sum(adapted)
    return (
        (x, *tensors),
        {"adapted": adapted, "biased": False, "scaling": scaling, "together": together},
        (dy,),
        (needs[0], *(False,) * members, *(needs[1],) * parameters),
        (acc, *(None,) * (members + parameters)),
    )


backward_by_decomposition(lora_linear_group_bwd, lora_linear_group, _group_forward)


@op(cost=lambda node: 2 * node.inputs[0].numel * (node.inputs[1].shape[0] + 2))
def dora_norm(weight: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Spec:
    """n = |W + s B A| of each row       W [O, I], A [r, I], B [O, r] float32 -> n [O], all in float32

    A constant to the gradient (Liu et al. 2024, section 4.3; `peft` detaches it).
    """
    fits = a.dtype == b.dtype == "float32" and weight.shape == (b.shape[0], a.shape[1]) and a.shape[0] == b.shape[1]
    require(fits, f"dora_norm: W {weight.shape}, A {a.shape} {a.dtype}, B {b.shape} {b.dtype}")
    return Spec(weight.shape[:1], "float32")


@dora_norm.decompose
def _(weight, a, b, *, scaling):
    rows = weight.shape[0]
    whole = add(cast(weight, "float32"), scale(linear_dx(b, a), factor=scaling))
    total = reshape(sum_to(square(whole), shape=(rows, 1)), shape=(rows,))
    return mul(total, rsqrt(total))


@dora_norm.vjp
def _(dys, ins, outs, needs, acc, *, scaling):
    return None, None, None
