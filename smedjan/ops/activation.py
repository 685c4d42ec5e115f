"""Activation functions, under the names that `config.json` has for them (transformers' ACT2FN)."""

from __future__ import annotations

from math import pi, sqrt

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add, add_scalar, divide, mul, power, scale, square


@op
def silu(x: Tensor) -> Spec:
    """y = x * sigmoid(x)"""
    return x.like()


@silu.vjp
def _(dys, ins, outs, needs, acc):
    return (silu_bwd(dys[0], ins[0]),)


@op
def silu_bwd(dy: Tensor, x: Tensor) -> Spec:
    """dx = dy * s (1 + x (1 - s)),  s = sigmoid(x)"""
    return dy.like()


@op(cost=lambda node: 10 * node.inputs[0].numel)
def gelu(x: Tensor, *, approximate: str = "none") -> Spec:
    """y = x Phi(x); with approximate "tanh", x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))

    Hendrycks & Gimpel 2016, section 2. One rounding to x's dtype."""
    require(approximate in ("none", "tanh"), f"gelu: approximate {approximate!r}")
    return x.like()


@gelu.vjp
def _(dys, ins, outs, needs, acc, *, approximate):
    return (gelu_bwd(dys[0], ins[0], approximate=approximate),)


@op(cost=lambda node: 15 * node.inputs[0].numel)
def gelu_bwd(dy: Tensor, x: Tensor, *, approximate: str) -> Spec:
    """dx = dy * d gelu(x) / dx"""
    return dy.like()


@op
def tanh(x: Tensor) -> Spec:
    """y = tanh(x)"""
    return x.like()


@tanh.vjp
def _(dys, ins, outs, needs, acc):
    return (tanh_bwd(dys[0], outs.public[0]),)


@op
def tanh_bwd(dy: Tensor, y: Tensor) -> Spec:
    """dx = dy (1 - y^2)"""
    return dy.like()


@op
def relu(x: Tensor) -> Spec:
    """y = max(x, 0)"""
    return x.like()


@relu.vjp
def _(dys, ins, outs, needs, acc):
    return (relu_bwd(dys[0], outs.public[0]),)


@op
def relu_bwd(dy: Tensor, y: Tensor) -> Spec:
    """dx = dy where y > 0, else 0"""
    return dy.like()


@op(cost=lambda node: 10 * node.inputs[0].numel)
def gelu_new(x: Tensor) -> Spec:
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): gelu's tanh form as transformers' NewGELUActivation has it"""
    return x.like()


@gelu_new.decompose
def _(x):
    """In single operations, each rounded to x's dtype, in transformers' order."""
    half = scale(x, factor=0.5)
    inner = scale(add(x, scale(power(x, exponent=3.0), factor=0.044715)), factor=sqrt(2.0 / pi))
    return mul(half, add_scalar(tanh(inner), value=1.0))


@gelu_new.vjp
def _(dys, ins, outs, needs, acc):
    return (gelu_new_bwd(dys[0], ins[0]),)


@op(cost=lambda node: 15 * node.inputs[0].numel)
def gelu_new_bwd(dy: Tensor, x: Tensor) -> Spec:
    """dx = dy * d gelu_new(x) / dx"""
    return dy.like()


@op
def relu2(x: Tensor) -> Spec:
    """y = max(x, 0)^2 (So et al. 2021)"""
    return x.like()


@relu2.decompose
def _(x):
    return square(relu(x))


@relu2.vjp
def _(dys, ins, outs, needs, acc):
    return (relu2_bwd(dys[0], ins[0]),)


@op(cost=lambda node: 2 * node.inputs[0].numel)
def relu2_bwd(dy: Tensor, x: Tensor) -> Spec:
    """dx = 2 dy max(x, 0)"""
    return dy.like()


for backward, forward in ((gelu_new_bwd, gelu_new), (relu2_bwd, relu2)):
    backward_by_decomposition(backward, forward, lambda dy, x: ((x,), {}, (dy,), (True,), (None,)))


ACTIVATIONS = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
    "gelu_new": gelu_new,
    "relu": relu,
    "relu2": relu2,
}
"""By their names in `hidden_act`."""


def activation(x: Tensor, act: str) -> Tensor:
    require(act in ACTIVATIONS, f"activation {act!r}")
    return ACTIVATIONS[act](x)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap) (Gemma 2, section 2), each operation rounded to x's dtype"""
    return scale(tanh(divide(x, divisor=cap)), factor=cap)
