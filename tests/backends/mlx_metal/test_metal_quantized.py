"""The kernels of quantised weights from their own source: bits, float64, their twins, and the limits of M1 to M4."""

from __future__ import annotations

import mlx.core as mx
import pytest
import torch
from metal_checks import DTYPES, held, normal
from metal_emulator import Recorder, check_limits, source_of
from mlx_pair import MLX, TORCH, from_torch

from smedjan.backends.mlx_metal import quantized
from smedjan.backends.mlx_metal.elementwise import DTYPES as DTYPE_OF
from smedjan.backends.mlx_metal.kernels import common
from smedjan.backends.mlx_metal.kernels import quantized as quantized_kernels
from smedjan.checkpoint import nf4
from smedjan.graph.node import Graph
from smedjan.ops.quantized import nf4_linear, nf4_specs


def nf4_of(weight: torch.Tensor) -> tuple[list[mx.array], dict]:
    raw = nf4.quantize(TORCH.to_raw(weight))
    return [MLX.from_raw(part) for part in raw.values()], raw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (5, 64), (131, 128), (3, 5462)])
def test_nf4_dequantize_gives_the_formats_bits(shape, dtype, metal):
    """Half a byte, a short last block, more than one nested block and more than one threadgroup. Here no product is
    contracted with a sum; Metal's compiler is told not to."""
    parts, raw = nf4_of(normal(*shape, seed=shape[1]))
    made = quantized.metal_nf4_dequantize(*parts, shape=shape, dtype=dtype)
    assert MLX.to_raw(made).data.tobytes() == nf4.dequantize(raw, shape, dtype).data.tobytes()
    assert "#pragma clang fp contract(off)" in source_of(*metal.launched[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outs", "width"), [(1, 13, 64), (3, 7, 320), (8, 17, 1088)])
def test_nf4_linear(rows, outs, width, dtype, metal):
    """Rows of x in one pass and in two, rows of w of no multiple, steps that end within a simdgroup."""
    parts, raw = nf4_of(normal(outs, width, seed=width))
    x, bias = normal(rows, width, dtype=dtype), normal(outs, dtype=dtype, seed=1)
    weight = TORCH.from_raw(nf4.dequantize(raw, (outs, width), "float32")).double()
    given, added = from_torch(MLX, x), from_torch(MLX, bias)
    for each, expected in ((added, x.double() @ weight.T + bias.double()), (None, x.double() @ weight.T)):
        made = quantized.metal_nf4_linear(given, *parts, each, shape=(outs, width))
        held("y", made, quantized.nf4_linear(given, *parts, each, shape=(outs, width)), expected, inexact=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outs", "width"), [(1, 13, 7), (2, 1, 257), (8, 17, 1003)])
def test_int8_linear(rows, outs, width, dtype, metal):
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(-127, 128, (outs, width), generator=generator).to(torch.int8)
    x, scales, bias = normal(rows, width, dtype=dtype), normal(outs).abs(), normal(outs, dtype=dtype, seed=1)
    given = [from_torch(MLX, each) for each in (x, codes, scales, bias)]
    expected = x.double() @ (codes.double() * scales.double()[:, None]).T + bias.double()
    held("y", quantized.metal_int8_linear(*given), quantized.int8_linear(*given), expected, inexact=0.0)


def test_many_rows_widen_the_weight_once(metal):
    """Past MAX_ROWS, and where a block of w lies in two of its rows, the product is MLX's."""
    for rows, width, label in (
        (quantized_kernels.MAX_ROWS, 128, "metal nf4_linear"),
        (quantized_kernels.MAX_ROWS + 1, 128, "metal nf4_dequantize, mlx"),
        (1, 96, "metal nf4_dequantize, mlx"),
    ):
        graph, shape = Graph(), (5, width)
        parts = [graph.input(name, spec.shape, spec.dtype) for name, spec in nf4_specs(shape).items()]
        graph.output("y", nf4_linear(graph.input("x", (rows, width), "bfloat16"), *parts, shape=shape))
        assert [call.label for call in MLX.program(graph).calls] == [label]


LINEARS = {
    "SmolLM2-135M": (576, 1536),
    "Qwen2.5-7B": (3584, 18944),
    "Llama-3.1-8B": (4096, 14336),
    "Mistral-7B-v0.3": (4096, 14336),
    "Gemma-2-2b": (2304, 9216),
    "Llama-3.1-70B": (8192, 28672),
}
"""hidden_size and intermediate_size."""


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("model", LINEARS)
def test_products_of_real_models_keep_the_limits(model, dtype, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(common, "DEVICE", recorder)
    for shape in (LINEARS[model], LINEARS[model][::-1]):
        specs = nf4_specs(shape).values()
        parts = [mx.zeros(spec.shape, DTYPE_OF[spec.dtype]) for spec in specs]
        for rows in (1, quantized_kernels.MAX_ROWS):
            x = mx.zeros((rows, shape[1]), dtype)
            quantized.metal_nf4_linear(x, *parts, None, shape=shape)
            quantized.metal_int8_linear(x, mx.zeros(shape, mx.int8), mx.zeros(shape[:1]), None)
        quantized.metal_nf4_linear_of_many(mx.zeros((512, shape[1]), dtype), *parts, None, shape=shape)
    assert len(recorder.launched) == 10
    for kernel, launch in recorder.launched:
        check_limits(source_of(kernel, launch), launch)
