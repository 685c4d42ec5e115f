"""Weights of 2 to 8 bits. They are frozen: products with them have a gradient to x alone.

NF4 is bitsandbytes' format, written down in `checkpoint/nf4.py`: codes, a scale for each BLOCK values, and a scale and
an offset for those scales. int8 (`checkpoint/int8.py`) has a scale for each row. Affine
(`checkpoint/affine.py`) is MLX's, with a scale and a bias for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import cast, mul, reshape
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


def int8_specs(shape: tuple[int, ...]) -> dict[str, Spec]:
    """What a weight of that shape is stored as: NAME.int8, NAME.scale."""
    return {"int8": Spec(shape, "int8"), "scale": Spec(shape[:1], "float32")}


STORED: dict[str, Callable[[tuple[int, ...]], dict[str, Spec]]] = {"nf4": nf4_specs, "int8": int8_specs}
"""What weights may be stored as; the first part of each has the name of its format."""


def dequantize(storage: str, parts: Sequence[Tensor], *, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The weight of a format's parts."""
    if storage == "int8":
        return int8_dequantize(*parts, dtype=dtype)
    return nf4_dequantize(*parts, shape=shape, dtype=dtype)


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


@int8_dequantize.decompose
def _(codes, scale, *, dtype):
    return cast(mul(cast(codes, "float32"), reshape(scale, shape=(codes.shape[0], 1))), dtype)


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


AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Affine:
    """How MLX holds a weight in few bits: each `group_size` values of a row share a scale and a bias."""

    bits: int
    group_size: int

    def specs(self, shape: tuple[int, ...], dtype: str) -> dict[str, Spec]:
        """What a weight of that shape is stored as, by the suffix of its name; scales are in the model's dtype."""
        rows, columns = shape
        scales = Spec((rows, columns // self.group_size), dtype)
        return {"affine": Spec((rows, columns * self.bits // 32), "uint32"), "scales": scales, "biases": scales}


def _affine_shape(codes: Tensor, scales: Tensor, biases: Tensor, bits: int, group_size: int) -> tuple[int, int]:
    require(bits in AFFINE_BITS and group_size in AFFINE_GROUPS, f"affine: {bits} bits, groups of {group_size}")
    require(codes.ndim == 2 and scales.ndim == 2, f"affine: codes {codes.shape}, scales {scales.shape}")
    shape = scales.shape[0], scales.shape[1] * group_size
    specs = Affine(bits=bits, group_size=group_size).specs(shape, scales.dtype)
    require([t.spec for t in (codes, scales, biases)] == list(specs.values()), f"affine: {codes}, {scales}, {biases}")
    return shape


@op(cost=lambda node: 2 * node.outputs[0].numel, remade=True)
def affine_dequantize(codes: Tensor, scales: Tensor, biases: Tensor, *, bits: int, group_size: int) -> Spec:
    """w = scale * code + bias, as `mx.dequantize` has it

    codes uint32 [O, I * bits / 32]: each row a stream of bits, the lowest first; scales, biases [O, I / group_size] ->
    w [O, I] in their dtype. The code (exact in any), the product and the sum are each rounded to that dtype.
    """
    return Spec(_affine_shape(codes, scales, biases, bits, group_size), scales.dtype)


@op(cost=_flops)
def affine_linear(
    x: Tensor, codes: Tensor, scales: Tensor, biases: Tensor, bias: Tensor | None = None, *, bits: int, group_size: int
) -> Spec:
    """y = x w^T + b       x [..., I], w [O, I] as `affine_dequantize` gives it, b [O] -> y [..., O]"""
    rows, columns = _affine_shape(codes, scales, biases, bits, group_size)
    require(x.shape[-1] == columns and x.dtype == scales.dtype, f"affine_linear: weight [{rows}, {columns}] for {x}")
    return x.like(shape=(*x.shape[:-1], rows))


@affine_linear.decompose
def _(x, codes, scales, biases, bias=None, *, bits, group_size):
    return linear(x, affine_dequantize(codes, scales, biases, bits=bits, group_size=group_size), bias)


@affine_linear.vjp
def _(dys, ins, outs, needs, acc, *, bits, group_size):
    dx = affine_linear_dx(dys[0], *ins[1:4], bits=bits, group_size=group_size) if needs[0] else None
    return dx, None, None, None, bias_grad(dys[0]) if needs[4] else None


@op(cost=lambda node: 2 * node.inputs[0].numel * node.outputs[0].shape[-1])
def affine_linear_dx(dy: Tensor, codes: Tensor, scales: Tensor, biases: Tensor, *, bits: int, group_size: int) -> Spec:
    """dx = dy w       dy [..., O], w [O, I] as `affine_dequantize` gives it -> dx [..., I]"""
    rows, columns = _affine_shape(codes, scales, biases, bits, group_size)
    require(dy.shape[-1] == rows and dy.dtype == scales.dtype, f"affine_linear_dx: weight [{rows}, {columns}] for {dy}")
    return dy.like(shape=(*dy.shape[:-1], columns))


@affine_linear_dx.decompose
def _(dy, codes, scales, biases, *, bits, group_size):
    return linear_dx(dy, affine_dequantize(codes, scales, biases, bits=bits, group_size=group_size))


@op
def affine_embedding(
    input_ids: Tensor, codes: Tensor, scales: Tensor, biases: Tensor, *, bits: int, group_size: int
) -> Spec:
    """y = w[input_ids]       input_ids [B, T], w [V, D] as `affine_dequantize` gives it -> y [B, T, D]"""
    _, columns = _affine_shape(codes, scales, biases, bits, group_size)
    return scales.like(shape=(*input_ids.shape, columns))


@affine_embedding.decompose
def _(input_ids, codes, scales, biases, *, bits, group_size):
    return embedding(input_ids, affine_dequantize(codes, scales, biases, bits=bits, group_size=group_size))
