"""Weights of few bits: NF4 and int8 widened in float32 and rounded once, or on Metal multiplied as they are where rows
are few; MLX's own format by its own functions."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import DTYPES, NAMES, wide
from smedjan.backends.mlx_metal.kernels import quantized as kernels
from smedjan.backends.mlx_metal.kernels.common import has_metal
from smedjan.backends.mlx_metal.linear import linear
from smedjan.backends.mlx_metal.table import RULES
from smedjan.graph.node import Node
from smedjan.ops.quantized import BLOCK, NESTED_BLOCK


@cache
def tables() -> tuple[mx.array, mx.array, list[float], float]:
    """The values of a byte's two codes, [256, 2], and of a scale's code, [256]; the bounds; the least divisor."""
    from smedjan.checkpoint import nf4  # with numpy, which this backend else does without

    normal = mx.array(nf4.NORMAL)
    byte = mx.arange(256)
    pairs = normal[mx.stack([mx.right_shift(byte, 4), byte & 15], axis=-1)]
    return pairs, mx.array(nf4.DYNAMIC), nf4.BOUNDS.tolist(), float(nf4.TINIEST)


@RULES.rule("nf4_dequantize")
def nf4_dequantize(
    codes: mx.array, absmax: mx.array, nested: mx.array, offset: mx.array, *, shape: tuple[int, int], dtype: str
) -> mx.array:
    pairs, dynamic, _, _ = tables()
    count = shape[0] * shape[1]
    scale = dynamic[absmax] * mx.repeat(nested, NESTED_BLOCK)[: absmax.size] + offset
    values = pairs[codes].reshape(-1)[:count] * mx.repeat(scale, BLOCK)[:count]
    return values.astype(DTYPES[dtype]).reshape(shape)


@RULES.rule("nf4_dequantize", label="metal nf4_dequantize", supports=has_metal)
def metal_nf4_dequantize(
    codes: mx.array, absmax: mx.array, nested: mx.array, offset: mx.array, *, shape: tuple[int, int], dtype: str
) -> mx.array:
    dynamic = tables()[1]
    return kernels.nf4_dequantize(codes, absmax, nested, offset, dynamic, shape=shape, dtype=DTYPES[dtype])


@RULES.rule("int8_dequantize")
def int8_dequantize(codes: mx.array, scale: mx.array, *, dtype: str) -> mx.array:
    return (wide(codes) * scale[:, None]).astype(DTYPES[dtype])


@RULES.rule("nf4_linear")
def nf4_linear(
    x: mx.array,
    codes: mx.array,
    absmax: mx.array,
    nested: mx.array,
    offset: mx.array,
    bias: mx.array | None,
    *,
    shape: tuple[int, int],
) -> mx.array:
    return linear(x, nf4_dequantize(codes, absmax, nested, offset, shape=shape, dtype=NAMES[x.dtype]), bias)


@RULES.rule("nf4_linear", label="metal nf4_dequantize, mlx", supports=has_metal)
def metal_nf4_linear_of_many(
    x: mx.array,
    codes: mx.array,
    absmax: mx.array,
    nested: mx.array,
    offset: mx.array,
    bias: mx.array | None,
    *,
    shape: tuple[int, int],
) -> mx.array:
    return linear(x, metal_nf4_dequantize(codes, absmax, nested, offset, shape=shape, dtype=NAMES[x.dtype]), bias)


def _few_rows(node: Node) -> bool:
    x = node.inputs[0]
    assert x is not None
    return has_metal() and 0 < prod(x.shape[:-1]) <= kernels.MAX_ROWS


def _whole_blocks(node: Node) -> bool:
    """Few rows, and no block of w lies in two of its rows."""
    return _few_rows(node) and node.attrs["shape"][1] % BLOCK == 0


@RULES.rule("nf4_linear", label="metal nf4_linear", supports=_whole_blocks)
def metal_nf4_linear(
    x: mx.array,
    codes: mx.array,
    absmax: mx.array,
    nested: mx.array,
    offset: mx.array,
    bias: mx.array | None,
    *,
    shape: tuple[int, int],
) -> mx.array:
    return kernels.nf4_linear(x, codes, absmax, nested, offset, tables()[1], bias, outs=shape[0])


@RULES.rule("int8_linear")
def int8_linear(x: mx.array, codes: mx.array, scale: mx.array, bias: mx.array | None) -> mx.array:
    return linear(x, int8_dequantize(codes, scale, dtype=NAMES[x.dtype]), bias)


@RULES.rule("int8_linear", label="metal int8_linear", supports=_few_rows)
def metal_int8_linear(x: mx.array, codes: mx.array, scale: mx.array, bias: mx.array | None) -> mx.array:
    return kernels.int8_linear(x, codes, scale, bias)


@RULES.rule("nf4_quantize")
def nf4_quantize(weight: mx.array) -> tuple[mx.array, mx.array]:
    values = wide(weight).reshape(-1)
    count = values.size
    short = -count % BLOCK
    _, _, bounds, tiniest = tables()
    blocks = mx.pad(values, (0, short)).reshape(-1, BLOCK)
    absmax = mx.abs(blocks).max(axis=1)
    divisor = mx.maximum(absmax, tiniest)
    scaled = blocks * (1.0 / divisor)[:, None]
    if short:
        absmax[-1], scaled[-1] = divisor[-1], blocks[-1] / divisor[-1]
    flat = scaled.reshape(-1)[: count + count % 2]
    code = sum(((flat > bound).astype(mx.uint8) for bound in bounds), mx.zeros(flat.shape, mx.uint8))
    return mx.left_shift(code[::2], 4) | code[1::2], absmax


@RULES.rule("int8_quantize")
def int8_quantize(weight: mx.array) -> tuple[mx.array, mx.array]:
    values = wide(weight)
    scale = mx.abs(values).max(axis=1) / 127
    codes = values / mx.where(scale == 0, 1.0, scale)[:, None]
    return mx.clip(mx.round(codes), -127, 127).astype(mx.int8), scale


@RULES.rule("affine_dequantize", label="mx.dequantize")
def affine_dequantize(codes: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int) -> mx.array:
    return mx.dequantize(codes, scales, biases, group_size=group_size, bits=bits)


@RULES.rule("affine_embedding", label="mx.dequantize")
def affine_embedding(
    input_ids: mx.array, codes: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int
) -> mx.array:
    codes, scales, biases = (part[input_ids] for part in (codes, scales, biases))
    return mx.dequantize(codes, scales, biases, group_size=group_size, bits=bits)


def multiplies_codes(node: Any) -> bool:
    """Metal's kernels sum in float32. Those of the CPU build sum in the arrays' dtype, one product after the other:
    measured at 2.5 times the error of a product in float32, four times in bfloat16, and outside the bound."""
    return mx.metal.is_available()


@RULES.rule("affine_linear", label="mx.quantized_matmul", supports=lambda node: multiplies_codes(node))
def affine_linear(
    x: mx.array,
    codes: mx.array,
    scales: mx.array,
    biases: mx.array,
    bias: mx.array | None,
    *,
    bits: int,
    group_size: int,
) -> mx.array:
    y = mx.quantized_matmul(x, codes, scales, biases, transpose=True, group_size=group_size, bits=bits)
    return y if bias is None else y + bias


@RULES.rule("affine_linear_dx", label="mx.quantized_matmul", supports=lambda node: multiplies_codes(node))
def affine_linear_dx(
    dy: mx.array, codes: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int
) -> mx.array:
    return mx.quantized_matmul(dy, codes, scales, biases, transpose=False, group_size=group_size, bits=bits)
