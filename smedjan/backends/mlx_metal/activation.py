"""Activations in float32, rounded to the declared dtype once, and their slopes."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import wide
from smedjan.backends.mlx_metal.table import RULES

ROOT_2_PI = math.sqrt(2.0 / math.pi)


@RULES.rule("silu")
def silu(x: mx.array) -> mx.array:
    gate = wide(x)
    return (gate * mx.sigmoid(gate)).astype(x.dtype)


def silu_slope(x: mx.array) -> mx.array:
    """d silu / dx in float32, for a float32 x."""
    sigmoid = mx.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


@RULES.rule("silu_bwd")
def silu_bwd(dy: mx.array, x: mx.array) -> mx.array:
    return (wide(dy) * silu_slope(wide(x))).astype(dy.dtype)


@RULES.rule("tanh")
def tanh(x: mx.array) -> mx.array:
    return mx.tanh(wide(x)).astype(x.dtype)


@RULES.rule("tanh_bwd")
def tanh_bwd(dy: mx.array, y: mx.array) -> mx.array:
    return (wide(dy) * (1 - mx.square(wide(y)))).astype(dy.dtype)


@RULES.rule("relu")
def relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0)


@RULES.rule("relu_bwd")
def relu_bwd(dy: mx.array, y: mx.array) -> mx.array:
    return mx.where(y > 0, dy, mx.zeros((), dtype=dy.dtype))


def _inner(x: mx.array) -> mx.array:
    return mx.tanh(ROOT_2_PI * (x + 0.044715 * x * x * x))


def _gelu(x: mx.array, approximate: str) -> mx.array:
    if approximate == "tanh":
        return 0.5 * x * (1 + _inner(x))
    return 0.5 * x * (1 + mx.erf(x / math.sqrt(2.0)))


def _gelu_slope(x: mx.array, approximate: str) -> mx.array:
    if approximate == "tanh":
        inner = _inner(x)
        return 0.5 * (1 + inner) + 0.5 * x * (1 - inner * inner) * ROOT_2_PI * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + mx.erf(x / math.sqrt(2.0))) + x * mx.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


@RULES.rule("gelu")
def gelu(x: mx.array, *, approximate: str) -> mx.array:
    return _gelu(wide(x), approximate).astype(x.dtype)


@RULES.rule("gelu_bwd")
def gelu_bwd(dy: mx.array, x: mx.array, *, approximate: str) -> mx.array:
    return (wide(dy) * _gelu_slope(wide(x), approximate)).astype(dy.dtype)


Curve = Callable[[mx.array], mx.array]
CURVES: dict[str, tuple[Curve, Curve]] = {
    "silu": (lambda x: x * mx.sigmoid(x), silu_slope),
    "swish": (lambda x: x * mx.sigmoid(x), silu_slope),
    "gelu": (lambda x: _gelu(x, "none"), lambda x: _gelu_slope(x, "none")),
    "gelu_pytorch_tanh": (lambda x: _gelu(x, "tanh"), lambda x: _gelu_slope(x, "tanh")),
    "gelu_new": (lambda x: _gelu(x, "tanh"), lambda x: _gelu_slope(x, "tanh")),
    "relu": (lambda x: mx.maximum(x, 0), lambda x: (x > 0).astype(mx.float32)),
    "relu2": (lambda x: mx.square(mx.maximum(x, 0)), lambda x: 2 * mx.maximum(x, 0)),
}
"""Each activation and its slope, of float32 arrays."""


def _rules(name: str) -> None:
    curve, slope = CURVES[name]

    def forward(x: mx.array) -> mx.array:
        return curve(wide(x)).astype(x.dtype)

    def backward(dy: mx.array, x: mx.array) -> mx.array:
        return (wide(dy) * slope(wide(x))).astype(dy.dtype)

    RULES.rule(name)(forward)
    RULES.rule(f"{name}_bwd")(backward)


_rules("gelu_new")
_rules("relu2")
