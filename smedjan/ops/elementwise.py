"""Elementwise ops and the sums that undo a broadcast. Arithmetic runs in the inputs' dtype; casts are nodes."""

from __future__ import annotations

from math import prod

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor


def broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a op b under numpy's rules."""
    size = max(len(a), len(b))
    wide_a, wide_b = (1,) * (size - len(a)) + a, (1,) * (size - len(b)) + b
    require(all(x == y or 1 in (x, y) for x, y in zip(wide_a, wide_b, strict=True)), f"{a} does not broadcast with {b}")
    return tuple(max(x, y) if 0 not in (x, y) else 0 for x, y in zip(wide_a, wide_b, strict=True))


@op
def ones(*, dtype: str = "float32") -> Spec:
    """1, a scalar: the cotangent of a loss by itself."""
    return Spec((), dtype)


@op(pure=False)
def identity(x: Tensor) -> Spec:
    """y = x under another name: gives a gradient a place of its own where one tensor is read twice."""
    return x.like()


@identity.vjp
def _(dys, ins, outs, needs, acc):
    return (dys[0],)


@op(pure=False)
def copy(x: Tensor) -> Spec:
    """y = x in memory of its own: what two outputs that are one tensor need, since each may be written to."""
    return x.like()


@op
def _cast(x: Tensor, *, dtype: str) -> Spec:
    """y = x rounded to `dtype` (nearest even)."""
    return x.like(dtype=dtype)


@_cast.vjp
def _(dys, ins, outs, needs, acc, *, dtype):
    return (cast(dys[0], ins[0].dtype),)


def cast(x: Tensor, dtype: str) -> Tensor:
    """x in `dtype`: no node where it already is."""
    return x if x.dtype == dtype else _cast(x, dtype=dtype)


@op
def sum_to(x: Tensor, *, shape: tuple[int, ...]) -> Spec:
    """Sums x over the dims that a broadcast from `shape` added or widened."""
    require(broadcast(x.shape, shape) == x.shape, f"{x.shape} is no broadcast of {shape}")
    return x.like(shape=shape)


def unbroadcast(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape == like.shape else sum_to(x, shape=like.shape)


@op
def add(a: Tensor, b: Tensor) -> Spec:
    """y = a + b, broadcast"""
    require(a.dtype == b.dtype, f"add of {a.dtype} and {b.dtype}: cast first")
    return a.like(shape=broadcast(a.shape, b.shape))


@add.vjp
def _(dys, ins, outs, needs, acc):
    return tuple(unbroadcast(dys[0], t) if need else None for t, need in zip(ins, needs, strict=True))


@op
def sub(a: Tensor, b: Tensor) -> Spec:
    """y = a - b, broadcast"""
    require(a.dtype == b.dtype, f"sub of {a.dtype} and {b.dtype}: cast first")
    return a.like(shape=broadcast(a.shape, b.shape))


@sub.vjp
def _(dys, ins, outs, needs, acc):
    a, b = ins
    return (
        unbroadcast(dys[0], a) if needs[0] else None,
        unbroadcast(scale(dys[0], factor=-1.0), b) if needs[1] else None,
    )


@op
def mul(a: Tensor, b: Tensor) -> Spec:
    """y = a * b, broadcast"""
    require(a.dtype == b.dtype, f"mul of {a.dtype} and {b.dtype}: cast first")
    return a.like(shape=broadcast(a.shape, b.shape))


@mul.vjp
def _(dys, ins, outs, needs, acc):
    a, b = ins
    return (
        unbroadcast(mul(dys[0], b), a) if needs[0] else None,
        unbroadcast(mul(dys[0], a), b) if needs[1] else None,
    )


@op
def div(a: Tensor, b: Tensor) -> Spec:
    """y = a / b, broadcast"""
    require(a.dtype == b.dtype, f"div of {a.dtype} and {b.dtype}: cast first")
    return a.like(shape=broadcast(a.shape, b.shape))


@div.vjp
def _(dys, ins, outs, needs, acc):
    a, b = ins
    return (
        unbroadcast(div(dys[0], b), a) if needs[0] else None,
        unbroadcast(mul(scale(dys[0], factor=-1.0), div(div(a, b), b)), b) if needs[1] else None,
    )


@op
def scale(x: Tensor, *, factor: float) -> Spec:
    """y = factor * x, with a constant factor"""
    return x.like()


@scale.vjp
def _(dys, ins, outs, needs, acc, *, factor):
    return (scale(dys[0], factor=factor),)


@op
def divide(x: Tensor, *, divisor: float) -> Spec:
    """y = x / divisor, with a constant: another rounding than the product with its reciprocal"""
    return x.like()


@divide.vjp
def _(dys, ins, outs, needs, acc, *, divisor):
    return (divide(dys[0], divisor=divisor),)


@op
def scale_by(x: Tensor, factor: Tensor) -> Spec:
    """y = factor * x, with a scalar that the device holds; x keeps its dtype"""
    require(factor.shape == (), f"factor must be a scalar, not {factor.shape}")
    return x.like()


@op
def divide_by(x: Tensor, divisor: Tensor) -> Spec:
    """y = x / divisor, with a float32 scalar that is not differentiated (a token count)"""
    require(divisor.shape == (), f"divisor must be a scalar, not {divisor.shape}")
    return x.like()


@divide_by.vjp
def _(dys, ins, outs, needs, acc):
    return (divide_by(dys[0], ins[1]), None)


@op
def sign(x: Tensor) -> Spec:
    """y = -1, 0 or 1"""
    return x.like()


@op
def clamp(x: Tensor, *, low: float, high: float) -> Spec:
    """y = min(max(x, low), high)"""
    return x.like()


@op
def add_scalar(x: Tensor, *, value: float) -> Spec:
    """y = x + value"""
    return x.like()


@add_scalar.vjp
def _(dys, ins, outs, needs, acc, *, value):
    return (dys[0],)


@op
def square(x: Tensor) -> Spec:
    """y = x^2"""
    return x.like()


@square.vjp
def _(dys, ins, outs, needs, acc):
    return (mul(dys[0], scale(ins[0], factor=2.0)),)


@op
def power(x: Tensor, *, exponent: float) -> Spec:
    """y = x^exponent"""
    return x.like()


@power.vjp
def _(dys, ins, outs, needs, acc, *, exponent):
    return (mul(dys[0], scale(power(ins[0], exponent=exponent - 1), factor=exponent)),)


@op
def rsqrt(x: Tensor) -> Spec:
    """y = x^(-1/2)"""
    return x.like()


@rsqrt.vjp
def _(dys, ins, outs, needs, acc):
    return (rsqrt_bwd(dys[0], outs.public[0]),)


@op
def rsqrt_bwd(dy: Tensor, y: Tensor) -> Spec:
    """dx = -1/2 dy y^3"""
    return dy.like()


@op
def reshape(x: Tensor, *, shape: tuple[int, ...]) -> Spec:
    """The same elements in C order under another shape."""
    require(prod(shape) == x.numel, f"{x.shape} cannot be reshaped to {shape}")
    return x.like(shape=shape)


@reshape.vjp
def _(dys, ins, outs, needs, acc, *, shape):
    return (reshape(dys[0], shape=ins[0].shape),)
