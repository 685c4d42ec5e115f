"""A linear layer whose product is taken of 8-bit floats, e4m3 (Micikevicius et al. 2022, "FP8 Formats for Deep
Learning"): opt-in, by `passes/fp8.py`."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import cast
from smedjan.ops.linear import bias_grad, group_gradients, linear, linear_dw, linear_dx, members
from smedjan.ops.shape import concat

MULTIPLE = 16
"""What both dims of a weight must be multiples of, for the tensor cores' libraries."""

LARGEST = 448.0
"""The largest number of e4m3: 1.75 2^8. It has 3 bits of fraction, normal numbers from 2^-6 and others from 2^-9."""

SMALLEST_SCALE = 2.0**-126
"""A scale below would be subnormal, and x / scale anything."""


@op(cost=lambda node: 4 * node.inputs[0].numel)
def fp8_rounded(x: Tensor) -> Spec:
    """y = s e4m3(x / s), a scale s = max(max |x| / 448, 2^-126) for each row       x [..., I] -> y [..., I] float32

    e4m3 rounds to the nearest, ties to even. A row holds an activation's or an output channel's values: with a scale of
    its own, one that is large does not cost the others their digits.
    """
    return x.like(dtype="float32")


@fp8_rounded.vjp
def _(dys, ins, outs, needs, acc):
    return (cast(dys[0], ins[0].dtype),)  # straight through: rounding has no slope of its own


@op(cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[0])
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Spec:
    """y = fp8(x) fp8(W)^T + b, fp8 of `fp8_rounded`       x [..., I], W [O, I], b [O] -> y [..., O]

    Products accumulate in float32; the sum is rounded once. Both operands are scaled anew at every call. The backward
    is `linear`'s, of x and W as they are, in their dtype: gradients reach further down than e4m3 does.
    """
    require(weight.ndim == 2 and weight.shape[1] == x.shape[-1], f"fp8_linear: weight {weight.shape} for x {x.shape}")
    require(x.dtype == weight.dtype, f"fp8_linear: x is {x.dtype}, weight {weight.dtype}: cast first")
    require(bias is None or bias.shape == weight.shape[:1], "fp8_linear: bias does not fit the weight")
    return x.like(shape=(*x.shape[:-1], weight.shape[0]))


@fp8_linear.decompose
def _(x, weight, bias):
    wide = None if bias is None else cast(bias, "float32")
    return cast(linear(fp8_rounded(x), fp8_rounded(weight), wide), x.dtype)


@fp8_linear.vjp
def _(dys, ins, outs, needs, acc):
    x, weight, _bias = ins
    return (
        linear_dx(dys[0], weight) if needs[0] else None,
        linear_dw(dys[0], x) if needs[1] else None,
        bias_grad(dys[0]) if needs[2] else None,
    )


@op(cost=lambda node: 2 * node.inputs[0].numel * node.outputs[0].shape[-1])
def fp8_linear_group(x: Tensor, *tensors: Tensor, biased: bool = False) -> Spec:
    """y = concat over i of fp8(x) fp8(W_i)^T + b_i: `linear_group` of 8-bit floats, x rounded once for all.

    tensors: the weights [O_i, I], then, where `biased`, the biases [O_i]; x [..., I] -> y [..., sum of O_i]
    """
    weights, biases = members(tensors, biased)
    require(all(w.ndim == 2 and w.shape[1] == x.shape[-1] and w.dtype == x.dtype for w in weights), "fp8_linear_group")
    require(all(b is None or b.shape == w.shape[:1] for w, b in zip(weights, biases, strict=True)), "fp8_linear_group")
    return x.like(shape=(*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


@fp8_linear_group.decompose
def _(x, *tensors, biased):
    weights, biases = members(tensors, biased)
    return concat(*(fp8_linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)), dim=-1)


fp8_linear_group.vjp(takes_acc=(0,))(group_gradients)
