"""Elementwise ops: float32 arithmetic, rounded to the declared dtype once. `mx.compile` fuses the casts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from smedjan.backends.mlx_metal.table import RULES

DTYPES: dict[str, mx.Dtype] = {
    "float64": mx.float64,
    "float32": mx.float32,
    "bfloat16": mx.bfloat16,
    "float16": mx.float16,
    "int64": mx.int64,
    "uint64": mx.uint64,
    "int32": mx.int32,
    "uint32": mx.uint32,
    "int16": mx.int16,
    "uint16": mx.uint16,
    "int8": mx.int8,
    "uint8": mx.uint8,
    "bool": mx.bool_,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def wide(x: mx.array) -> mx.array:
    """x in float32: a Python scalar beside a bfloat16 array would be rounded to bfloat16 first."""
    return x.astype(mx.float32)


@RULES.rule("ones")
def ones(*, dtype: str) -> mx.array:
    return mx.ones((), dtype=DTYPES[dtype])


@RULES.rule("copy")
@RULES.rule("identity")
def identity(x: mx.array) -> mx.array:
    return x


@RULES.rule("_cast")
def cast(x: mx.array, *, dtype: str) -> mx.array:
    return x.astype(DTYPES[dtype])


@RULES.rule("sum_to")
def sum_to(x: mx.array, *, shape: tuple[int, ...]) -> mx.array:
    lead = x.ndim - len(shape)
    axes = [*range(lead), *(i for i in range(lead, x.ndim) if shape[i - lead] == 1 and x.shape[i] != 1)]
    if not axes:
        return x.reshape(shape)
    return wide(x).sum(axis=axes, keepdims=True).astype(x.dtype).reshape(shape)


@RULES.rule("add")
def add(a: mx.array, b: mx.array) -> mx.array:
    return a + b


@RULES.rule("sub")
def sub(a: mx.array, b: mx.array) -> mx.array:
    return a - b


@RULES.rule("mul")
def mul(a: mx.array, b: mx.array) -> mx.array:
    return a * b


@RULES.rule("div")
def div(a: mx.array, b: mx.array) -> mx.array:
    return (wide(a) / wide(b)).astype(a.dtype)


@RULES.rule("sign")
def sign(x: mx.array) -> mx.array:
    return mx.sign(x)


@RULES.rule("clamp")
def clamp(x: mx.array, *, low: float, high: float) -> mx.array:
    return mx.clip(wide(x), low, high).astype(x.dtype)


@RULES.rule("scale")
def scale(x: mx.array, *, factor: float) -> mx.array:
    return (wide(x) * factor).astype(x.dtype)


@RULES.rule("divide")
def divide(x: mx.array, *, divisor: float) -> mx.array:
    return (wide(x) / divisor).astype(x.dtype)


@RULES.rule("power")
def power(x: mx.array, *, exponent: float) -> mx.array:
    return (wide(x) ** exponent).astype(x.dtype)


@RULES.rule("scale_by")
def scale_by(x: mx.array, factor: mx.array) -> mx.array:
    return (wide(x) * wide(factor)).astype(x.dtype)


@RULES.rule("divide_by")
def divide_by(x: mx.array, divisor: mx.array) -> mx.array:
    return (wide(x) / wide(divisor)).astype(x.dtype)


@RULES.rule("add_scalar")
def add_scalar(x: mx.array, *, value: float) -> mx.array:
    return (wide(x) + value).astype(x.dtype)


@RULES.rule("square")
def square(x: mx.array) -> mx.array:
    return mx.square(x)


@RULES.rule("rsqrt")
def rsqrt(x: mx.array) -> mx.array:
    return mx.rsqrt(wide(x)).astype(x.dtype)


@RULES.rule("rsqrt_bwd")
def rsqrt_bwd(dy: mx.array, y: mx.array) -> mx.array:
    root = wide(y)
    return (-0.5 * wide(dy) * root * root * root).astype(dy.dtype)


@RULES.rule("reshape")
def reshape(x: mx.array, *, shape: tuple[int, ...]) -> mx.array:
    return x.reshape(shape)


def device_scalar(value: Any, dtype: mx.Dtype = mx.float32) -> mx.array:
    """A host number or a scalar array as a scalar array."""
    return value.astype(dtype) if isinstance(value, mx.array) else mx.array(value, dtype=dtype)
