"""Shapes of quantised weights: SmolLM2-135M, Qwen3-0.6B and Llama-3-8B, one sequence and several."""

from __future__ import annotations

from torch import Tensor

from smedjan.backends.cuda_triton.examples.example import Example, array
from smedjan.ops.quantized import nf4_specs


def parts(outs: int, width: int) -> tuple[Tensor, ...]:
    return tuple(array(*spec.shape, dtype=spec.dtype) for spec in nf4_specs((outs, width)).values())


def _dequantize(outs: int, width: int, dtype: str, name: str) -> Example:
    attrs = {"shape": (outs, width), "dtype": dtype}
    return Example(op="nf4_dequantize", name=f"{name} {outs} x {width}", ins=parts(outs, width), attrs=attrs)


def _quantize(outs: int, width: int, dtype: str, name: str) -> Example:
    return Example(op="nf4_quantize", name=f"{name} {outs} x {width}", ins=(array(outs, width, dtype=dtype),))


def _nf4(rows: int, outs: int, width: int, dtype: str, name: str) -> Example:
    return Example(
        op="nf4_linear",
        name=f"{name} {rows} row{'s' * (rows > 1)}, {outs} x {width}",
        ins=(array(rows, 1, width, dtype=dtype), *parts(outs, width), None),
        attrs={"shape": (outs, width)},
    )


def _int8(rows: int, outs: int, width: int, dtype: str, name: str) -> Example:
    return Example(
        op="int8_linear",
        name=f"{name} {rows} row{'s' * (rows > 1)}, {outs} x {width}",
        ins=(
            array(rows, 1, width, dtype=dtype),
            array(outs, width, dtype="int8"),
            array(outs, dtype="float32"),
            array(outs, dtype=dtype),
        ),
    )


EXAMPLES = [
    _dequantize(4096, 14336, "bfloat16", "bf16"),
    _dequantize(576, 576, "float32", "f32"),
    _quantize(4096, 14336, "bfloat16", "bf16"),
    _quantize(576, 576, "float32", "f32"),
    _nf4(1, 576, 576, "bfloat16", "bf16"),
    _nf4(1, 14336, 4096, "bfloat16", "bf16"),
    _nf4(2, 3072, 1024, "bfloat16", "bf16"),
    _nf4(16, 14336, 4096, "bfloat16", "bf16"),
    _nf4(1, 576, 1536, "float32", "f32"),
    _int8(1, 576, 576, "bfloat16", "bf16"),
    _int8(1, 14336, 4096, "bfloat16", "bf16"),
    _int8(2, 3072, 1024, "bfloat16", "bf16"),
    _int8(16, 14336, 4096, "bfloat16", "bf16"),
    _int8(1, 576, 1536, "float32", "f32"),
]

EXPLAINED = {
    "nf4_linear": "one row: x is read by every program, from the first cache, scales by each half of a block",
    "int8_linear": "one row: x is read by every program, from the first cache",
}
