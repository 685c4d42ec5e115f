"""Linear layers over frozen weights whose forward product is of 8-bit integers on both sides: opt-in, by
`passes/w8a8.py`.

A scale for each row of x (a token) and for each row of W (an output channel): "vector-wise quantization" of LLM.int8()
(Dettmers et al. 2022, section 3.1), without its outlier columns; "per-token, per-channel" W8A8 in SmoothQuant (Xiao et
al. 2023, section 2), without its smoothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add, cast, scale
from smedjan.ops.linear import linear, linear_dx, linear_group_dx
from smedjan.ops.lora import lora_linear_group_bwd, per_member
from smedjan.ops.shape import concat

T = TypeVar("T")

LARGEST = 127
"""The largest code of either sign."""

SMALLEST_ROW = LARGEST * 2.0**-126
"""What a row's largest magnitude is at least taken for: its scale would be subnormal, and 127 / it infinite."""

WIDEST = (2**31 - 1) // LARGEST**2
"""The most products of codes whose sum is sure to be an int32: 133,144."""


def parts(
    tensors: Sequence[T], count: int, biased: bool, adapters: int = 0
) -> tuple[list[T], list[T], list[T], list[T], list[T], list[T]]:
    """(weights, codes, scales, biases, As, Bs) of an op's tensors, in their order: `count` linear layers."""
    sizes = (count, count, count, count * biased, adapters, adapters)
    require(len(tensors) == sum(sizes), f"w8a8: {len(tensors)} tensors for {sizes}")
    found, left = [], list(tensors)
    for size in sizes:
        found.append(left[:size])
        left = left[size:]
    weights, codes, scales, biases, a, b = found
    return weights, codes, scales, biases, a, b


def count_of(tensors: Sequence[T], biased: bool) -> int:
    """How many linear layers a `w8a8_linear` has."""
    return len(tensors) // (4 if biased else 3)


def _check(x: Tensor, weights: list[Tensor], codes: list[Tensor], scales: list[Tensor], biases: list[Tensor]) -> None:
    require(x.shape[-1] <= WIDEST, f"w8a8: sums of {x.shape[-1]} products may leave int32, at most {WIDEST}")
    for w, q, s in zip(weights, codes, scales, strict=True):
        fits = w.ndim == 2 and w.shape[1] == x.shape[-1] and w.dtype == x.dtype
        require(fits, f"w8a8: W {w.shape} {w.dtype} for x {x.shape} {x.dtype}")
        fits = q.spec == Spec(w.shape, "int8") and s.spec == Spec(w.shape[:1], "float32")
        require(fits, f"w8a8: codes {q.spec}, scale {s.spec} for W {w.shape}")
    for w, bias in zip(weights, biases, strict=False):
        require(bias.shape == w.shape[:1], f"w8a8: W {w.shape}, bias {bias.shape}")


@op(cost=lambda node: 2 * node.inputs[0].numel * node.outputs[0].shape[-1])
def w8a8_linear(x: Tensor, *tensors: Tensor, biased: bool = False) -> Spec:
    """y = concat over i of (q Q_i^T) s S_i + b_i of linear layers of one input; one layer is a group, too

        m = max(max |x|, 127 2^-126) of each row;  s = m / 127;  q = x (127 / m) to the nearest integer, ties to even

    tensors: all weights W_i [O_i, I]; their codes Q_i int8 [O_i, I] and scales S_i float32 [O_i], as `int8_quantize`
    gives them; where `biased`, all b_i [O_i]. x [..., I] -> y [..., sum of O_i].

    q Q^T is an exact integer, and |q Q^T| < 2^31. It becomes a float32, is multiplied by s, then by S, then b is added,
    a float32 rounding each; y is rounded to x's dtype. A row with a number that is not finite gives NaN.

    W is frozen, and the gradient straight through both roundings: dx = dy W, in full precision, that of the float layer
    at the activations of this forward pass.
    """
    weights, codes, scales, biases, _, _ = parts(tensors, count_of(tensors, biased), biased)
    require(len(weights) > 0, "w8a8_linear: no weight")
    _check(x, weights, codes, scales, biases)
    return x.like(shape=(*x.shape[:-1], sum(w.shape[0] for w in weights)))


@w8a8_linear.vjp(takes_acc=(0,))
def _(dys, ins, outs, needs, acc, *, biased):
    assert not any(needs[1:]), "w8a8_linear: what it is made of is frozen"
    weights, *_ = parts(ins[1:], count_of(ins[1:], biased), biased)
    if len(weights) > 1:
        dx = linear_group_dx(dys[0], acc[0], *weights)
    else:  # in the ops that every backend has: an exact one takes nothing apart behind `grad`
        dx = linear_dx(dys[0], weights[0])
        dx = dx if acc[0] is None else add(acc[0], dx)
    return dx, *(None,) * (len(ins) - 1)


def _lora_flops(node) -> int:
    x, *tensors = node.inputs
    adapted = node.attrs["adapted"]
    weights, _, _, _, a, b = parts(tensors, len(adapted), node.attrs["biased"], sum(adapted))
    return 2 * (x.numel // x.shape[-1]) * sum(t.numel for t in (*weights, *a, *b))


@op(saves=("low",), cost=_lora_flops)
def w8a8_lora_linear(
    x: Tensor, *tensors: Tensor, adapted: tuple[bool, ...], biased: bool = False, scaling: float
) -> tuple[Spec, Spec]:
    """y = w8a8_linear(x, ...), and beside the members that are `adapted` s (x A_i^T) B_i^T in float32

    tensors: those of `w8a8_linear`, then A_i [r, I] and, after those, B_i [O_i, r] of the adapted members. Adapters
    read x as it is. Saves low = x A^T [..., r * adapters] float32. Dtypes, roundings and gradients are
    `lora_linear_group`'s, with `w8a8_linear` for the base.
    """
    weights, codes, scales, biases, a, b = parts(tensors, len(adapted), biased, sum(adapted))
    require(any(adapted), "w8a8_lora_linear: no member has an adapter, use w8a8_linear")
    _check(x, weights, codes, scales, biases)
    for weight, down, up in zip(weights, per_member(a, adapted), per_member(b, adapted), strict=True):
        if down is not None and up is not None:
            fits = down.shape == (a[0].shape[0], x.shape[-1]) and up.shape == (weight.shape[0], down.shape[0])
            require(fits, f"w8a8_lora_linear: W {weight.shape}, A {down.shape}, B {up.shape}, rank {a[0].shape[0]}")
            require(down.dtype == up.dtype == "float32", f"w8a8_lora_linear: A is {down.dtype}, B {up.dtype}")
    outs = sum(weight.shape[0] for weight in weights)
    ranks = sum(each.shape[0] for each in a)
    return x.like(shape=(*x.shape[:-1], outs)), Spec((*x.shape[:-1], ranks), "float32")


@w8a8_lora_linear.decompose
def _(x, *tensors, adapted, biased, scaling):
    weights, codes, scales, biases, a, b = parts(tensors, len(adapted), biased, sum(adapted))
    made = []
    for index, (down, up) in enumerate(zip(per_member(a, adapted), per_member(b, adapted), strict=True)):
        # The base before the adapter, as PEFT computes it: creation order decides the gradients' bits.
        y = w8a8_linear(x, weights[index], codes[index], scales[index], *biases[index : index + 1], biased=biased)
        if down is not None:
            low = scale(linear(linear(cast(x, "float32"), down), up), factor=scaling)
            y = cast(add(cast(y, "float32"), low), y.dtype)
        made.append(y)
    return made[0] if len(made) == 1 else concat(*made, dim=-1)


@w8a8_lora_linear.vjp(takes_acc=(0,))
def _(dys, ins, outs, needs, acc, *, adapted, biased, scaling):
    x, *tensors = ins
    weights, _, _, _, a, b = parts(tensors, len(adapted), biased, sum(adapted))
    frozen = len(tensors) - len(a) - len(b)
    assert not any(needs[1 : 1 + frozen]), "w8a8_lora_linear: the base is frozen"
    wanted = (needs[0], any(needs[1 + frozen :]))
    found = lora_linear_group_bwd(
        dys[0], x, outs.saved[0], acc[0], *weights, *a, *b, adapted=adapted, needs=wanted, scaling=scaling
    )
    found = list(found) if isinstance(found, tuple) else [found]
    dx = found.pop(0) if wanted[0] else None
    return dx, *(None,) * frozen, *(found if wanted[1] else [None] * (len(a) + len(b)))
