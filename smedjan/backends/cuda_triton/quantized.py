"""Weights of 4 and 8 bits on Triton: rules over `kernels/quantized.py`. Formulas there.

Many rows are no work for these kernels: then `nf4_linear` and `int8_linear` have no rule, and what runs is what they
are made of, the weight dequantised and a product of cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import quantized as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows
from smedjan.checkpoint import nf4
from smedjan.graph.node import Node

MAX_ROWS = 16
"""Rows of x up to which the weight is decoded in the product. Each four rows decode it anew, at a table entry a value:
past that, dequantising (4.5 bytes a value moved instead of 0.5) and a tensor core product cost less."""

UNFUSED = {"num_warps": 4, "enable_fp_fusion": False}
"""Options where a product and a sum are rounded each: the weight's bits are bitsandbytes'."""

DEQUANTIZE_BLOCKS = 32
"""Blocks of a program, 2048 values, 16 a thread."""

QUANTIZE_BLOCKS = 16
"""Blocks of a program, 8 values a thread."""


@lru_cache(maxsize=8)
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """NORMAL [16] and DYNAMIC [256], float32, brought to the device once."""
    return torch.from_numpy(nf4.NORMAL.copy()).to(device), torch.from_numpy(nf4.DYNAMIC.copy()).to(device)


@RULES.kernel("nf4_dequantize", label="triton nf4_dequantize")
def nf4_dequantize(run: Launches, ins: tuple, outs: tuple, *, shape: tuple[int, int], dtype: str) -> None:
    """codes, absmax, nested, offset -> w [O, I]"""
    codes, absmax, nested, offset = ins
    (out,) = outs
    blocks = absmax.shape[0]
    run.kernel(
        kernels.nf4_dequantize,
        (common.cdiv(blocks, DEQUANTIZE_BLOCKS),),
        codes,
        absmax,
        nested,
        offset,
        *tables(run.device),
        out,
        prod(shape),
        codes.shape[0],
        blocks,
        BLOCKS=DEQUANTIZE_BLOCKS,
        **UNFUSED,
    )


@RULES.kernel("nf4_quantize", label="triton nf4_quantize")
def nf4_quantize(run: Launches, ins: tuple, outs: tuple) -> None:
    """w [O, I] -> codes, scales. w is contiguous, as parameters are."""
    (weight,) = ins
    codes, absmax = outs
    assert weight.is_contiguous(), f"a weight of strides {weight.stride()}"
    blocks = nf4.blocks_of(weight.numel())
    run.kernel(
        kernels.nf4_quantize,
        (common.cdiv(blocks, QUANTIZE_BLOCKS),),
        weight,
        codes,
        absmax,
        weight.numel(),
        common.cdiv(weight.numel(), 2),
        blocks,
        BLOCKS=QUANTIZE_BLOCKS,
        **UNFUSED,
    )


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A program's tile of a product: `rows` of x, `outs` rows of w, `step` values of each at once."""

    rows: int
    outs: int
    step: int

    def grid(self, rows: int, outs: int) -> tuple[int, int]:
        return common.cdiv(outs, self.outs), common.cdiv(rows, self.rows)


OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def walk(rows: int, width: int) -> Walk:
    """32 sums a thread at most: of one row of x, 4 rows of w by 1024 values; with each row more, fewer of w."""
    held = min(common.next_power_of_2(rows), 4)
    return Walk(rows=held, outs=4 // held, step=min(common.next_power_of_2(width), 1024))


def _few_rows(node: Node) -> bool:
    x = node.inputs[0]
    assert x is not None
    return 0 < prod(x.shape[:-1]) <= MAX_ROWS


def _whole_blocks(node: Node) -> bool:
    """Few rows, and no block of w lies in two of its rows."""
    return _few_rows(node) and node.attrs["shape"][1] % nf4.BLOCK == 0


@RULES.kernel("nf4_linear", label="triton nf4_linear", supports=_whole_blocks)
def nf4_linear(run: Launches, ins: tuple, outs: tuple, *, shape: tuple[int, int]) -> None:
    """x [..., I], codes, absmax, nested, offset, bias [O] -> y [..., O]"""
    x, codes, absmax, nested, offset, bias = ins
    x, y = as_rows(x), as_rows(outs[0])
    tile = walk(x.shape[0], shape[1])
    run.kernel(
        kernels.nf4_linear,
        tile.grid(x.shape[0], shape[0]),
        x,
        codes,
        absmax,
        nested,
        offset,
        bias,
        *tables(run.device),
        y,
        x.stride(0),
        y.stride(0),
        x.shape[0],
        shape[0],
        shape[1] // nf4.BLOCK,
        ROWS=tile.rows,
        OUTS=tile.outs,
        BLOCKS=max(tile.step // nf4.BLOCK, 1),
        **OPTIONS,
    )


@RULES.kernel("int8_linear", label="triton int8_linear", supports=_few_rows)
def int8_linear(run: Launches, ins: tuple, outs: tuple) -> None:
    """x [..., I], codes int8 [O, I], scale [O], bias [O] -> y [..., O]"""
    x, codes, scale, bias = ins
    x, y = as_rows(x), as_rows(outs[0])
    tile = walk(x.shape[0], codes.shape[1])
    run.kernel(
        kernels.int8_linear,
        tile.grid(x.shape[0], codes.shape[0]),
        x,
        codes,
        scale,
        bias,
        y,
        x.stride(0),
        y.stride(0),
        x.shape[0],
        *codes.shape,
        ROWS=tile.rows,
        OUTS=tile.outs,
        COLS=tile.step,
        **OPTIONS,
    )
