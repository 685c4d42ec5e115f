"""rms_norm and layer_norm on Triton, alone or behind a residual sum: rules over `kernels/norm.py` and
`kernels/layer_norm.py`. Formulas there.

Arrays are [..., D] with contiguous rows, which may lie apart (`Rows`). A weight's gradient is made in two stages:
partial sums of each program, in scratch memory, then one launch that adds them up, for weight and bias together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import layer_norm as layer_kernels
from smedjan.backends.cuda_triton.kernels import norm as kernels
from smedjan.backends.cuda_triton.rows import rows_of
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.errors import ShapeError
from smedjan.graph.node import Node

BOTH = ((0, 0), (0, 1), (1, 0), (1, 1))
"""sum over x or over delta, and y over the other."""


def _checked(*parameters: Tensor | None) -> int:
    """The width of a norm's rows, once its weight and bias hold."""
    given = [parameter for parameter in parameters if parameter is not None]
    assert all(parameter.is_contiguous() for parameter in given)
    width = given[0].shape[0]
    if width > common.MAX_WIDTH:
        raise ShapeError(
            f"a norm over {width} values, the Triton kernel holds at most {common.MAX_WIDTH}",
            field="hidden_size",
            remedy="use --backend torch_reference",
        )
    return width


@RULES.kernel("rms_norm", label="triton rms_norm", inplace=((0, 0),), strided=True)
def rms_norm(run: Launches, ins: tuple, outs: tuple, **attrs: Any) -> None:
    """x [..., D], weight [D] -> y [..., D] in x's dtype, rstd [...] float32.

    `weight_cast` is when the product meets the weight: "before" rounds x * rstd to x's dtype first (Llama), "after"
    rounds once at the end (Gemma, with offset 1.0).
    """
    x, weight = ins
    y, rstd = outs
    _rms_norm(run, (x, None, weight), (None, y, rstd), factor=1.0, **attrs)


@RULES.kernel("add_rms_norm", label="triton add_rms_norm", inplace=BOTH, strided=True)
def add_rms_norm(run: Launches, ins: tuple, outs: tuple, **attrs: Any) -> None:
    """x, delta [..., D], weight [D] -> x + factor * delta, and y and rstd of that."""
    _rms_norm(run, ins, outs, **attrs)


def _rms_norm(
    run: Launches, ins: tuple, outs: tuple, *, eps: float, weight_cast: str, offset: float, factor: float
) -> None:
    (x, delta, weight), (total, y, rstd) = ins, outs
    width = _checked(weight)
    if x.numel() == 0:
        return
    rows, tile = rows_of(x, delta, total, y), common.norm_tile(width)
    run.kernel(
        kernels.rms_norm_fwd,
        (common.cdiv(rows.count, tile.rows),),
        x,
        delta,
        weight,
        total,
        y,
        rstd,
        *rows.strides,
        rows.heads,
        rows.tokens,
        rows.count,
        width,
        eps,
        offset,
        factor,
        ROWS=tile.rows,
        COLS=tile.cols,
        CAST_BEFORE=weight_cast == "before",
        **tile.options,
    )


@RULES.kernel("layer_norm", label="triton layer_norm", inplace=((0, 0),), strided=True)
def layer_norm(run: Launches, ins: tuple, outs: tuple, **attrs: Any) -> None:
    """x [..., D], weight, bias [D] -> y [..., D] in x's dtype, mean and rstd [...] float32."""
    x, weight, bias = ins
    y, mean, rstd = outs
    _layer_norm(run, (x, None, weight, bias), (None, y, mean, rstd), factor=1.0, **attrs)


@RULES.kernel("add_layer_norm", label="triton add_layer_norm", inplace=BOTH, strided=True)
def add_layer_norm(run: Launches, ins: tuple, outs: tuple, **attrs: Any) -> None:
    """x, delta [..., D], weight, bias [D] -> x + factor * delta, and y, mean and rstd of that."""
    _layer_norm(run, ins, outs, **attrs)


def _layer_norm(run: Launches, ins: tuple, outs: tuple, *, eps: float, composed: bool, factor: float) -> None:
    """`composed` names roundings that only an exact backend reproduces."""
    (x, delta, weight, bias), (total, y, mean, rstd) = ins, outs
    width = _checked(weight, bias)
    if x.numel() == 0:
        return
    rows, tile = rows_of(x, delta, total, y), common.norm_tile(width)
    run.kernel(
        layer_kernels.layer_norm_fwd,
        (common.cdiv(rows.count, tile.rows),),
        x,
        delta,
        weight,
        bias,
        total,
        y,
        mean,
        rstd,
        *rows.strides,
        rows.heads,
        rows.tokens,
        rows.count,
        width,
        eps,
        factor,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )


def _over(node: Node) -> tuple[tuple[int, int], ...]:
    """dx over dy, over the cotangent that waits, or over x."""
    names = node.op.parameters
    return tuple((0, names.index(name)) for name in ("dy", "acc", "x")) if node.attrs["needs"][0] else ()


@RULES.kernel("rms_norm_bwd", label="triton rms_norm_bwd", inplace=_over, strided=True)
def rms_norm_bwd(
    run: Launches, ins: tuple, outs: tuple, *, needs: tuple[bool, bool], eps: float, weight_cast: str, offset: float
) -> None:
    """x, dy, acc [..., D], weight [D], rstd [...] -> dx [..., D] in x's dtype, dw [D] in weight's: what is needed.

    `acc` is the cotangent that already waits at x: dx includes it, and is rounded once. Neither `eps` (rstd holds it)
    nor `weight_cast` (a rounding, whose derivative is 1) enters.
    """
    x, weight, rstd, dy, acc = ins
    dx, *sums = _named(outs, needs)
    _backward(run, kernels.rms_norm_bwd, (x, weight, rstd, dy, acc), dx, sums, offset)


@RULES.kernel("layer_norm_bwd", label="triton layer_norm_bwd", inplace=_over, strided=True)
def layer_norm_bwd(
    run: Launches, ins: tuple, outs: tuple, *, needs: tuple[bool, bool, bool], eps: float, composed: bool
) -> None:
    """x, dy, acc [..., D], weight [D], mean, rstd [...] -> dx [..., D] in x's dtype, dw, db [D]: what is needed."""
    x, weight, _bias, mean, rstd, dy, acc = ins
    dx, *sums = _named(outs, needs)
    _backward(run, layer_kernels.layer_norm_bwd, (x, weight, mean, rstd, dy, acc), dx, sums)


def _named(outs: tuple, needs: Sequence[bool]) -> list[Tensor | None]:
    found = iter(outs)
    return [next(found) if need else None for need in needs]


def _backward(
    run: Launches, kernel: Any, ins: tuple, dx: Tensor | None, sums: Sequence[Tensor | None], *scalars: float
) -> None:
    """`ins`: x, weight, what the forward pass saved, dy and acc. `sums`: the gradients that are sums over rows."""
    x, weight, *saved, dy, acc = ins
    assert all(each.is_contiguous() for each in saved)
    width, wanted = _checked(weight), [out for out in sums if out is not None]
    if x.numel() == 0:
        for out in wanted:
            run.zero(out)
        return
    rows, fused = rows_of(x, dy, acc, dx), width <= common.MAX_FUSED_WIDTH
    tile = common.norm_bwd_tile(width)
    # Without sums no program needs to live longer than its tile.
    programs = common.cdiv(rows.count, tile.rows)
    partial, parts = None, [None] * len(sums)
    if wanted:
        shared = common.row_programs(rows.count, tile) if fused else common.wide_programs(rows.count)
        partial = run.scratch((len(wanted) * shared, width), torch.float32)
        split = iter(partial.split(shared))
        parts = [None if out is None else next(split) for out in sums]
        if fused:
            programs = shared
        else:
            # Before dx, which may take the place of x or of dy.
            _wide_partials(run, x, saved, dy, parts, shared)
            parts = [None] * len(sums)
    if dx is not None or (wanted and fused):
        run.kernel(
            kernel,
            (programs,),
            *ins,
            dx,
            *parts,
            *rows.strides,
            rows.heads,
            rows.tokens,
            rows.count,
            width,
            *scalars,
            ROWS=tile.rows,
            COLS=tile.cols,
            **tile.options,
        )
    if partial is not None:
        column_sums(run, partial, wanted)


def _wide_partials(
    run: Launches, x: Tensor, saved: Sequence[Tensor], dy: Tensor, parts: Sequence[Tensor | None], programs: int
) -> None:
    """[programs, width] each: of dy * n and, of a layer norm, of dy."""
    rows, width, tile = rows_of(x, dy), x.shape[-1], common.column_tile()
    mean, rstd = saved if len(saved) == 2 else (None, saved[0])
    dw, db = parts if len(parts) == 2 else (parts[0], None)
    run.kernel(
        kernels.wide_partials,
        (programs, common.cdiv(width, tile.cols)),
        x,
        mean,
        rstd,
        dy,
        dw,
        db,
        *rows.strides,
        rows.heads,
        rows.tokens,
        rows.count,
        width,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )


def column_sums(run: Launches, partial: Tensor, outs: Sequence[Tensor], counts: Sequence[int] = ()) -> None:
    """partial [rows, width] float32 -> one or two results [width]: each the sum of its part of the rows, `counts` of
    them, or as many as the other."""
    rows, width = partial.shape
    counts = counts or [rows // len(outs)] * len(outs)
    tile = common.sums_tile(width)
    run.kernel(
        kernels.column_sums,
        (common.cdiv(width, tile.cols), len(outs)),
        partial,
        outs[0],
        outs[1] if len(outs) == 2 else None,
        counts[0],
        counts[1] if len(outs) == 2 else 0,
        width,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )
