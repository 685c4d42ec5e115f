"""rms_norm in three passes forward and four backward, statistics in float32 as declared; layer_norm is aten's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cpu_native.native.team import call, step, threads
from smedjan.backends.cpu_native.table import DTYPES, PLANNED, RULES, compiled
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import row_blocks
from smedjan.graph.node import Node


def _gain(weight, offset):
    return weight.float() + offset if offset else weight.float()


@RULES.rule("rms_norm", label="cpu_native fused rms_norm")
def rms_norm(x, weight, *, eps, weight_cast, offset):
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = wide * rstd.unsqueeze(-1)
    if weight_cast == "before":
        return normed.to(x.dtype).mul_(weight), rstd
    return normed.mul_(_gain(weight, offset)).to(x.dtype), rstd


@RULES.rule("rms_norm_bwd", label="cpu_native fused rms_norm")
def rms_norm_bwd(x, weight, rstd, dy, acc, *, needs, eps, weight_cast, offset):
    wide, cotangent, scale = x.float(), dy.float(), rstd.unsqueeze(-1)
    made = []
    if needs[0]:
        g = cotangent * _gain(weight, offset)
        projection = torch.linalg.vecdot(g, wide).mul_(rstd.square()).div_(x.shape[-1]).unsqueeze(-1)
        dx = g.addcmul_(wide, projection, value=-1.0).mul_(scale).to(x.dtype)
        made.append(dx if acc is None else dx.add_(acc))
    if needs[1]:
        made.append((cotangent * wide).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype))
    return made[0] if len(made) == 1 else tuple(made)


@RULES.rule("layer_norm", label="aten native_layer_norm")
def layer_norm(x, weight, bias, *, eps, composed):
    """A float32 weight makes aten keep mean and rstd in float32, as the op declares, whatever x's dtype."""
    wide = None if bias is None else bias.float()
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight.float(), wide, eps)
    return y, mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


@RULES.rule("layer_norm_bwd", label="aten native_layer_norm_backward")
def layer_norm_bwd(x, weight, bias, mean, rstd, dy, acc, *, needs, eps, composed):
    made = torch.ops.aten.native_layer_norm_backward(
        dy, x, list(weight.shape), mean, rstd, weight.float(), None if bias is None else bias.float(), list(needs)
    )
    kept = [gradient.to(weight.dtype) for gradient, need in zip(made, needs, strict=True) if need]
    if acc is not None:
        kept[0].add_(acc)
    return kept[0] if len(kept) == 1 else tuple(kept)


# Of plans: one pass over a row while it is in the cache. Formulas in native/src/norm_rows.c.

NATIVE = "native rms_norm"


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _rms(
    run: Launches,
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    outs: tuple,
    *,
    eps: float,
    weight_cast: str,
    offset: float,
    factor: float,
) -> None:
    total, y, rstd = outs
    steps = []
    for rows, deltas, totals, made, rstds in row_blocks((x, delta, total, y), (rstd,)):
        assert rows is not None
        numbers = (
            *rows.shape,
            *map(_stride, (rows, deltas, totals, made)),
            int(weight_cast == "after"),
            _stride(rstds),
        )
        kernel = f"rms_fwd_{DTYPES[x.dtype]}"
        steps.append(step(kernel, (rows, deltas, weight, totals, made, rstds), numbers, (eps, offset, factor)))
    call(run, "rms_norm", *steps)


@PLANNED.kernel("rms_norm", label=NATIVE, supports=compiled, inplace=((0, 0),), strided=True)
def planned_rms_norm(run: Launches, ins: tuple, outs: tuple, **attrs: Any) -> None:
    x, weight = ins
    _rms(run, x, None, weight, (None, *outs), factor=1.0, **attrs)


@PLANNED.kernel("add_rms_norm", label=NATIVE, supports=compiled, inplace=((0, 0), (0, 1), (1, 1), (1, 0)))
def planned_add_rms_norm(run: Launches, ins: tuple, outs: tuple, **attrs: Any) -> None:
    x, delta, weight = ins
    total, y, rstd = outs
    if total is None:  # the norm reads it
        total = run.scratch(tuple(x.shape), x.dtype)
    _rms(run, x, delta, weight, (total, y, rstd), **attrs)


def _over(node: Node) -> tuple[tuple[int, int], ...]:
    return ((0, 4), (0, 3)) if node.attrs["needs"][0] else ()


@PLANNED.kernel("rms_norm_bwd", label=NATIVE, supports=compiled, inplace=_over, strided=True)
def planned_rms_norm_bwd(
    run: Launches, ins: tuple, outs: tuple, *, needs: tuple[bool, bool], eps: float, weight_cast: str, offset: float
) -> None:
    x, weight, rstd, dy, acc = ins
    found = iter(outs)
    dx, dweight = (next(found) if need else None for need in needs)
    parts = None
    if dweight is not None:
        parts = run.scratch((threads(), x.shape[-1]), torch.float32)
        run.library("aten zero", Tensor.zero_, parts)
    steps = []
    for rows, dys, waiting, made, rstds in row_blocks((x, dy, acc, dx), (rstd,)):
        assert rows is not None
        numbers = (*rows.shape, *map(_stride, (rows, dys, waiting, made, rstds)))
        kernel = f"rms_bwd_{DTYPES[x.dtype]}"
        steps.append(step(kernel, (rows, weight, rstds, dys, waiting, made, parts), numbers, (offset,)))
    call(run, "rms_norm_bwd", *steps)
    if dweight is not None:
        call(run, "sum_parts", step(f"sum_parts_{DTYPES[dweight.dtype]}", (parts, dweight), (threads(), x.shape[-1])))
