"""Products of 8-bit integers, summed in float64: integers below 2^53, so that the sum is exact in any order."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from smedjan.backends.torch_reference.table import RULES
from smedjan.ops.w8a8 import LARGEST, SMALLEST_ROW, count_of, parts

ERROR_ROWS = 1024
"""Rows of which `error` holds products at once."""


def coded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., I] -> its codes, float32 [..., I], and scales [..., 1]: 0 and NaN for a row that is not finite."""
    wide = x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    finite = largest.isfinite()
    largest = torch.where(finite, largest, 1.0).clamp(min=SMALLEST_ROW)
    most = torch.tensor(float(LARGEST), device=x.device)  # torch divides a number by a tensor in two roundings
    codes = torch.where(finite, (wide * (most / largest)).round(), 0.0)
    return codes, torch.where(finite, largest / most, torch.nan)


def product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y of one layer       x [..., I], codes [O, I], scale [O], bias [O] -> y [..., O]"""
    rows, row_scale = coded_rows(x)
    y = (rows.double() @ codes.double().t()).float() * row_scale * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


@RULES.rule("w8a8_linear")
def w8a8_linear(x, *tensors, biased):
    _, codes, scales, biases, _, _ = parts(tensors, count_of(tensors, biased), biased)
    return product(x, torch.cat(codes), torch.cat(scales), torch.cat(biases) if biases else None)


def error(run: Callable[..., Tensor], x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    """|w8a8_linear(x, W) - x W^T| / |x W^T| of a layer that `run(x, weight, codes, scale)` computes (Euclidean norms,
    x W^T in float32): what 8-bit integers cost it. 0 where x W^T is."""
    wide = weight.float().t()
    off = size = 0.0
    for rows in x.reshape(-1, x.shape[-1]).split(ERROR_ROWS):
        exact = rows.float() @ wide
        ours = run(rows, weight, codes, scale)
        off += float((ours.float() - exact).square().sum(dtype=torch.float64))
        size += float(exact.square().sum(dtype=torch.float64))
    return sqrt(off / size) if size else 0.0
