"""The update on Triton: rules over `kernels/optimizer.py`. Formulas there.

A whole update is two launches for the norm and the clip, and one for each bucket of parameters that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate as running_sum
from math import gcd, sqrt

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import optimizer as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.ops.optimizer import BLOCK, LISTS, bucket_lists, magnitudes, middles, split_bucket

HALF = 1 << 16


def _halves(value: int) -> tuple[float, float]:
    """An integer below 2^40 as two numbers that float32 holds exactly."""
    return float(value // HALF), float(value % HALF)


def numbers(lr: float, step: int, seed: int | None, *, beta1: float, beta2: float, weight_decay: float) -> list[float]:
    """What the kernel reads of a step, folded in float64, as torch folds it, and rounded once."""
    folded = [1.0 - lr * weight_decay, lr / (1.0 - beta1**step), sqrt(1.0 - beta2**step)]
    if seed is None:
        return folded
    return [*folded, *_halves(step), *_halves(seed & 0xFFFFFFFF), *_halves(seed >> 32 & 0xFFFFFFFF)]


@cache
def levels() -> list[float]:
    """The dynamic data type: signed magnitudes, their middles, unsigned magnitudes, their middles."""
    return [value for signed in (True, False) for values in (magnitudes, middles) for value in values(signed=signed)]


def segments(starts: Callable[[], Sequence[int]], sizes: Sequence[int], sites: Sequence[int]) -> list[float]:
    """The parameters of a bucket in the order in which they lie there: first tile, start, size, site.

    `starts` gives where each begins. It is asked when the list runs: a bucket's order is its memory's.
    """
    found = sorted((start, size, site) for start, size, site in zip(starts(), sizes, sites, strict=True) if size)
    table: list[float] = []
    tile = 0
    for start, size, site in found:
        table += [*_halves(tile), *_halves(start), *_halves(size), float(site)]
        tile += common.cdiv(size, common.adamw_tile().rows * BLOCK)
    return table


def _starts(params: Sequence[Tensor], flat: Tensor) -> list[int]:
    return [(param.data_ptr() - flat.data_ptr()) // param.element_size() for param in params]


@RULES.kernel("adamw_bucket", label="triton adamw", scalars=True)
def adamw_bucket(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    sites: tuple[int, ...],
    eight_bit: bool,
    narrow: str,
    stochastic: tuple[bool, bool],
) -> None:
    """All of a bucket's parameters in one launch. Outputs are the inputs' buffers."""
    bucket = split_bucket(ins, sites, eight_bit=eight_bit, narrow=narrow)
    lr, step, seed, grad_scale, norm = bucket.scalars
    sizes = [param.numel() for param in bucket.params]
    if not any(sizes):
        return
    # Weights before their masters: what is stacked among them stays so, and all follow the first list's order.
    names = sorted(bucket_lists(eight_bit=eight_bit, narrow=narrow), key=lambda name: name != "narrows")
    flat = dict(zip(names, run.flat(*(getattr(bucket, name) for name in names)), strict=True))
    count, tile = sum(sizes), common.adamw_tile()
    tiles = [common.cdiv(size, tile.rows * BLOCK) for size in sizes]
    table = None
    if any(stochastic):
        starts = partial(_starts, bucket.params, flat["params"])
        table = run.host(partial(segments, starts, sizes, sites))
    folded = partial(numbers, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
    run.kernel(
        kernels.adamw,
        (sum(tiles) if table is not None else common.cdiv(count, tile.rows * BLOCK),),
        *(flat.get(name) for name in LISTS),
        grad_scale,
        norm,
        run.host(folded, lr, step, seed if table is not None else None),
        run.host(levels) if eight_bit else None,
        table,
        count,
        sum(size > 0 for size in sizes),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        BY_CHANCE=stochastic[0],
        SQ_BY_CHANCE=stochastic[1],
        ALIGNMENT=gcd(BLOCK, *sizes),
        ROWS=tile.rows,
        **tile.options,
    )


@RULES.kernel("adamw_update", label="triton adamw", scalars=True)
def adamw_update(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One parameter: a bucket of one."""
    param, grad, exp_avg, exp_avg_sq, lr, step, grad_scale, norm = ins
    adamw_bucket(
        run,
        (param, grad, exp_avg, exp_avg_sq, lr, step, None, grad_scale, norm),
        outs,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        sites=(0,),
        eight_bit=False,
        narrow="",
        stochastic=(False, False),
    )


def _norm(run: Launches, grads: Sequence[Tensor], norm: Tensor, coefficient: Tensor | None, max_norm: float) -> None:
    """One pass over each dtype's gradients, up to 1024 partial sums each, which one program adds: the order, hence the
    result, is fixed by the shapes."""
    tile = common.square_sum_tile()
    alike: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        if grad.numel():
            alike.setdefault(grad.dtype, []).append(grad)
    sizes = [sum(grad.numel() for grad in each) for each in alike.values()]
    programs = [common.square_sum_programs(size) for size in sizes]
    sums = run.scratch((max(sum(programs), 1),), torch.float32)
    firsts = running_sum(programs, initial=0)
    for each, size, shares, first in zip(alike.values(), sizes, programs, firsts, strict=False):
        (flat,) = run.flat(each)
        run.kernel(kernels.square_sum, (shares,), flat, sums, size, first, COLS=tile.cols, **tile.options)
    run.kernel(
        kernels.root_of_sum, (1,), sums, norm, coefficient, sum(programs), max_norm, COLS=tile.cols, **tile.options
    )


@RULES.kernel("global_norm", label="triton global_norm")
def global_norm(run: Launches, ins: tuple, outs: tuple) -> None:
    """Of whole gradients. Only empty ones have norm 0."""
    _norm(run, ins, outs[0], None, 0.0)


@RULES.kernel("norm_and_clip", label="triton global_norm")
def norm_and_clip(run: Launches, ins: tuple, outs: tuple, *, max_norm: float) -> None:
    norm, coefficient = outs
    if norm is None:
        norm = run.scratch((), torch.float32)
    _norm(run, ins, norm, coefficient, max_norm)


@RULES.kernel("clip_coefficient", label="triton clip_coefficient")
def clip_coefficient(run: Launches, ins: tuple, outs: tuple, *, max_norm: float) -> None:
    tile = common.flat_tile()
    run.kernel(kernels.clip_coefficient, (1,), ins[0], outs[0], max_norm, **{**tile.options, "num_warps": 1})


@RULES.kernel("keep", label="triton keep")
def keep(run: Launches, ins: tuple, outs: tuple) -> None:
    """Whole arrays. `old` is the result's place."""
    new, old, norm = ins
    assert new.is_contiguous(), f"strides {new.stride()}"
    assert old.is_contiguous(), f"strides {old.stride()}"
    tile = common.flat_tile()
    grid = (common.cdiv(old.numel(), tile.cols),)
    run.kernel(kernels.keep, grid, new, old, norm, old.numel(), COLS=tile.cols, **tile.options)


@RULES.kernel("accumulate", label="triton accumulate")
def accumulate(run: Launches, ins: tuple, outs: tuple) -> None:
    """Whole arrays."""
    total, grad = ins
    assert total.is_contiguous()
    assert grad.is_contiguous()
    tile = common.flat_tile()
    grid = (common.cdiv(total.numel(), tile.cols),)
    run.kernel(kernels.accumulate, grid, total, grad, total.numel(), COLS=tile.cols, **tile.options)
