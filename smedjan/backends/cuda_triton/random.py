"""Dropout, its mask and noise on Triton: rules over `kernels/random.py`. Formulas there."""

from __future__ import annotations

import torch

from smedjan.backends.cuda_triton.elementwise import same_place
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import random as kernels
from smedjan.backends.cuda_triton.layout import walk
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches

COUNTERS = 256
"""Counters a program draws, four values each."""


def threshold(p: float) -> int:
    """Of 2^24 equally likely values, those below it are dropped."""
    return round(p * 2**24)


def _flat(run: Launches, x: torch.Tensor | None, key: torch.Tensor, y: torch.Tensor, p: float, site: int) -> None:
    grid = (common.cdiv(y.numel(), 4 * COUNTERS),)
    options = common.flat_tile().options
    factor = 1.0 / (1.0 - p)
    run.kernel(kernels.keep, grid, x, key, y, site, threshold(p), factor, y.numel(), COUNTERS=COUNTERS, **options)


@RULES.kernel("keep_mask", label="triton keep")
def keep_mask(run: Launches, ins: tuple, outs: tuple, *, shape: tuple[int, ...], p: float, site: int) -> None:
    (key,) = ins
    (mask,) = outs
    _flat(run, None, key, mask, p, site)


@RULES.kernel("uniform", label="triton uniform")
def uniform(run: Launches, ins: tuple, outs: tuple, *, shape: tuple[int, ...], bound: float, site: int) -> None:
    (key,) = ins
    (y,) = outs
    if y.numel():
        grid, options = (common.cdiv(y.numel(), 4 * COUNTERS),), common.flat_tile().options
        run.kernel(kernels.uniform, grid, key, y, site, bound, y.numel(), COUNTERS=COUNTERS, **options)


@RULES.kernel("dropout", label="triton keep", inplace=same_place)
def dropout(run: Launches, ins: tuple, outs: tuple, *, p: float, site: int) -> None:
    x, key = ins
    (y,) = outs
    if x.is_contiguous():
        _flat(run, x, key, y, p, site)
    elif y.numel():
        grid, places, constants = walk(y, x).launch()
        factor = 1.0 / (1.0 - p)
        run.kernel(kernels.keep_strided, grid, x, key, y, site, threshold(p), factor, *places, **constants)
