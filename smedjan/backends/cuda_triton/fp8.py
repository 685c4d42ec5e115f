"""Linear layers in e4m3: quantisation by `kernels/fp8.py`, the product by the library."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import fp8 as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows
from smedjan.graph.node import Node
from smedjan.ops.fp8 import MULTIPLE

CAPABILITY = (8, 9)
"""The compute capability from which tensor cores multiply e4m3: Ada's."""

ERROR_ROWS = 1024
"""Rows of which `fp8_error` holds float32 products at once."""


LABEL = "triton fp8_quantize + cublas _scaled_mm"


def _fits(node: Node) -> bool:
    """What the library takes: bfloat16 results, dims of whole 16 bytes."""
    weights = [tensor for tensor in node.inputs[1:] if tensor is not None and tensor.ndim == 2]
    return all(
        weight.dtype == "bfloat16" and all(size % MULTIPLE == 0 and size > 0 for size in weight.shape)
        for weight in weights
    )


def _quantize(run: Launches, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, width] -> its codes, float8_e4m3fn, and scales [rows, 1]."""
    rows, width = x.shape
    tile = common.fp8_tile(width)
    codes, scales = run.scratch((rows, width), torch.uint8), run.scratch((rows, 1), torch.float32)
    run.kernel(
        kernels.fp8_quantize,
        (common.cdiv(rows, tile.rows),),
        x,
        codes,
        scales,
        x.stride(0),
        rows,
        width,
        WHOLE=width <= tile.cols,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )
    return codes.view(torch.float8_e4m3fn), scales


def _product(run: Launches, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x [..., I], weight [O, I] -> y [..., O], a scale for each row of both."""
    if x.numel() == 0:
        return
    codes, scales = _quantize(run, as_rows(x))
    weight_codes, weight_scales = _quantize(run, weight)
    run.library(
        "cublas _scaled_mm",
        torch._scaled_mm,
        codes,
        weight_codes.t(),
        scale_a=scales,
        scale_b=weight_scales.t(),
        bias=bias,
        out_dtype=y.dtype,
        out=as_rows(y),
    )


@RULES.kernel("fp8_linear", label=LABEL, supports=_fits)
def fp8_linear(run: Launches, ins: tuple, outs: tuple) -> None:
    x, weight, bias = ins
    _product(run, x, weight, bias, outs[0])


@RULES.kernel("fp8_linear_group", label=f"{LABEL}, stacked", supports=_fits)
def fp8_linear_group(run: Launches, ins: tuple, outs: tuple, *, biased: bool) -> None:
    x, *tensors = ins
    count = len(tensors) // 2 if biased else len(tensors)
    bias = run.stacked(tensors[count:]) if biased else None
    _product(run, x, run.stacked(tensors[:count]), bias, outs[0])


def fp8_error(x: Tensor, weight: Tensor) -> float:
    """|fp8_linear(x, W) - x W^T| / |x W^T| of a layer (Euclidean norms, the product in float32): what e4m3 costs it,
    the final rounding to bfloat16 included. 0 where x W^T is."""
    wide = weight.float().t()
    off = size = 0.0
    for rows in as_rows(x).split(ERROR_ROWS):
        exact = rows.float() @ wide
        ours = RULES.lower(node_of("fp8_linear", (rows, weight), {})).run(rows, weight)
        off += float((ours.float() - exact).square().sum(dtype=torch.float64))
        size += float(exact.square().sum(dtype=torch.float64))
    return sqrt(off / size) if size else 0.0
