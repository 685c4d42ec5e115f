"""Weights of 4 and 8 bits. They are frozen: products with them have a gradient to x alone.

NF4 is bitsandbytes' format, written down in `checkpoint/nf4.py`: codes, a scale for each BLOCK values, and a scale and
an offset for those scales.
"""

from __future__ import annotations

from math import prod

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.embedding import embedding
from smedjan.ops.linear import bias_grad, linear, linear_dx

BLOCK = 64
"""Values that share a scale."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own."""


def nf4_specs(shape: tuple[int, ...]) -> dict[str, Spec]:
    """What a weight of that shape is stored as, by the suffix of its name: NAME.nf4, NAME.absmax, ..."""
    numel = prod(shape)
    blocks = -(-numel // BLOCK)
    return {
        "nf4": Spec((-(-numel // 2),), "uint8"),
        "absmax": Spec((blocks,), "uint8"),
        "nested_absmax": Spec((-(-blocks // NESTED_BLOCK),), "float32"),
        "offset": Spec((), "float32"),
    }


def _check_nf4(name: str, parts: tuple[Tensor, ...], shape: tuple[int, ...]) -> None:
    for part, (suffix, spec) in zip(parts, nf4_specs(shape).items(), strict=True):
        require(part.spec == spec, f"{name}: {suffix} is {part.spec}, not {spec}, for a weight {list(shape)}")


@op(cost=lambda node: 4 * node.outputs[0].numel, remade=True)
def nf4_dequantize(
    codes: Tensor, absmax: Tensor, nested: Tensor, offset: Tensor, *, shape: tuple[int, int], dtype: str
) -> Spec:
    """w = NORMAL[codes] * (DYNAMIC[absmax] * nested + offset)

    codes uint8 [ceil(n / 2)], the first of two in the high bits, absmax uint8 [n / 64], nested float32 [n / 16384],
    offset float32 [] -> w [O, I] of n values. Every operation in float32, the product rounded to `dtype` once.
    """
    _check_nf4("nf4_dequantize", (codes, absmax, nested, offset), shape)
    return Spec(shape, dtype)


@op
def nf4_quantize(weight: Tensor) -> tuple[Spec, Spec]:
    """w [O, I] -> codes uint8 [ceil(n / 2)], and max |w| of each 64 values, float32 [n / 64], not quantised itself."""
    specs = nf4_specs(weight.shape)
    return specs["nf4"], Spec(specs["absmax"].shape, "float32")


def _flops(node) -> int:
    return 2 * node.inputs[0].numel * node.outputs[0].shape[-1]


@op(cost=_flops)
def nf4_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    *,
    shape: tuple[int, int],
) -> Spec:
    """y = x w^T + b       x [..., I], w [O, I] as `nf4_dequantize` gives it, b [O] -> y [..., O]"""
    _check_nf4("nf4_linear", (codes, absmax, nested, offset), shape)
    require(x.shape[-1] == shape[1], f"nf4_linear: weight {shape} for x {x.shape}")
    return x.like(shape=(*x.shape[:-1], shape[0]))


@nf4_linear.decompose
def _(x, codes, absmax, nested, offset, bias=None, *, shape):
    return linear(x, nf4_dequantize(codes, absmax, nested, offset, shape=shape, dtype=x.dtype), bias)


@nf4_linear.vjp
def _(dys, ins, outs, needs, acc, *, shape):
    x, *parts, _bias = ins
    dx = linear_dx(dys[0], nf4_dequantize(*parts, shape=shape, dtype=x.dtype)) if needs[0] else None
    return dx, None, None, None, None, bias_grad(dys[0]) if needs[5] else None


@op
def int8_quantize(weight: Tensor) -> tuple[Spec, Spec]:
    """scale = max |w| / 127 over each row; codes = w / scale to the nearest integer, ties to even, 0 in a row of zeros

    w [O, I] -> codes int8 [O, I] from -127 to 127, scale float32 [O]
    """
    return weight.like(dtype="int8"), Spec(weight.shape[:1], "float32")


@op(remade=True)
def int8_dequantize(codes: Tensor, scale: Tensor, *, dtype: str) -> Spec:
    """w = codes * scale       codes int8 [O, I], scale float32 [O] -> w [O, I], in float32, rounded to `dtype` once"""
    require(codes.dtype == "int8" and scale.spec == Spec(codes.shape[:1], "float32"), f"int8: {codes}, scale {scale}")
    return codes.like(dtype=dtype)


@op(cost=_flops)
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Spec:
    """y = x w^T + b       x [..., I], w [O, I] as `int8_dequantize` gives it, b [O] -> y [..., O]"""
    require(codes.dtype == "int8" and scale.spec == Spec(codes.shape[:1], "float32"), f"int8: {codes}, scale {scale}")
    require(x.shape[-1] == codes.shape[1], f"int8_linear: weight {codes.shape} for x {x.shape}")
    return x.like(shape=(*x.shape[:-1], codes.shape[0]))


@int8_linear.decompose
def _(x, codes, scale, bias=None):
    return linear(x, int8_dequantize(codes, scale, dtype=x.dtype), bias)


@int8_linear.vjp
def _(dys, ins, outs, needs, acc):
    x, codes, scale, _bias = ins
    dx = linear_dx(dys[0], int8_dequantize(codes, scale, dtype=x.dtype)) if needs[0] else None
    return dx, None, None, bias_grad(dys[0]) if needs[3] else None


@op
def int8_embedding(input_ids: Tensor, codes: Tensor, scale: Tensor, *, dtype: str) -> Spec:
    """y = w[input_ids]       input_ids [B, T], w [V, D] as `int8_dequantize` gives it -> y [B, T, D] in `dtype`"""
    require(codes.dtype == "int8" and scale.spec == Spec(codes.shape[:1], "float32"), f"int8: {codes}, scale {scale}")
    return Spec((*input_ids.shape, codes.shape[1]), dtype)


@int8_embedding.decompose
def _(input_ids, codes, scale, *, dtype):
    return embedding(input_ids, int8_dequantize(codes, scale, dtype=dtype))
