"""rms_norm and layer_norm on Triton: launchers of `kernels/norm.py`. Formulas there.

Tensors are [..., D]: the leading dimensions are rows, one stride apart (`as_rows`). No launcher waits for the device.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import norm as kernels
from smedjan.errors import ShapeError


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as a view [rows, D] with contiguous rows, one stride apart. Anything else is a defect of the plan."""
    assert x.stride(-1) == 1 or x.shape[-1] <= 1, (
        f"rows are not contiguous: shape {list(x.shape)}, strides {x.stride()}"
    )
    # view() cannot infer the row count of an empty tensor.
    return x.view(prod(x.shape[:-1]), x.shape[-1])


def _checked(x: Tensor, weight: Tensor, weight_cast: str) -> Tensor:
    """x as rows, once the shapes and the attribute hold."""
    assert weight_cast in ("before", "after"), f"weight_cast {weight_cast!r} is neither 'before' nor 'after'"
    assert weight.shape == x.shape[-1:], f"weight {list(weight.shape)}, x {list(x.shape)}"
    assert weight.is_contiguous()
    if x.shape[-1] > common.MAX_WIDTH:
        raise ShapeError(
            f"rms_norm over {x.shape[-1]} values, the Triton kernel holds at most {common.MAX_WIDTH}",
            field="hidden_size",
            remedy="use --backend torch_reference",
        )
    return as_rows(x)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, weight_cast: str = "before"
) -> tuple[Tensor, Tensor]:
    """x [..., D], weight [D] -> y [..., D] in x's dtype, rstd [...] float32.

    `weight_cast` is when the product meets the weight: "before" rounds x * rstd to x's dtype first (Llama), "after"
    rounds once at the end (Gemma, with offset 1.0).
    """
    x2 = _checked(x, weight, weight_cast)
    rows, width = x2.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, rstd
    tile = common.norm_tile(width)
    kernels.rms_norm_fwd[(common.cdiv(rows, tile.rows),)](
        x2,
        weight,
        y,
        rstd,
        x2.stride(0),
        rows,
        width,
        eps,
        offset,
        ROWS=tile.rows,
        COLS=tile.cols,
        CAST_BEFORE=weight_cast == "before",
        **tile.options,
    )
    return y, rstd


def rms_norm_bwd(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dy: Tensor,
    acc: Tensor | None = None,
    *,
    needs: tuple[bool, bool],
    eps: float,
    offset: float = 0.0,
    weight_cast: str = "before",
) -> tuple[Tensor | None, Tensor | None]:
    """x, dy, acc [..., D], weight [D], rstd [...] -> dx [..., D] in x's dtype, dw [D] in weight's; None if not needed.

    `acc` is the cotangent that already waits at x: dx includes it, and is rounded once. Neither `eps` (rstd holds it)
    nor `weight_cast` (a rounding, whose derivative is 1) enters; they are the op's attributes.
    """
    need_dx, need_dw = needs
    assert need_dx or need_dw, "a backward op that nothing needs"
    assert acc is None or (need_dx and acc.shape == x.shape), "acc waits at an x of another shape, or at one not needed"
    assert dy.shape == x.shape
    assert rstd.shape == x.shape[:-1]
    assert rstd.is_contiguous()
    x2, dy2, acc2 = _checked(x, weight, weight_cast), as_rows(dy), None if acc is None else as_rows(acc)
    rows, width = x2.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    if rows == 0:
        return dx, torch.zeros_like(weight) if need_dw else None

    tile = common.norm_bwd_tile(width)
    fused = need_dw and width <= common.MAX_FUSED_WIDTH
    partial = None
    if fused:
        partial = torch.empty(common.row_programs(rows, tile), width, dtype=torch.float32, device=x.device)
    if need_dx or fused:
        # Without dw no program needs to live longer than its tile.
        programs = common.cdiv(rows, tile.rows) if partial is None else partial.shape[0]
        kernels.rms_norm_bwd[(programs,)](
            x2,
            weight,
            rstd,
            dy2,
            acc2,
            dx,
            partial,
            x2.stride(0),
            dy2.stride(0),
            0 if acc2 is None else acc2.stride(0),
            rows,
            width,
            offset,
            ROWS=tile.rows,
            COLS=tile.cols,
            **tile.options,
        )
    if not need_dw:
        return dx, None
    if partial is None:
        partial = _wide_partial(x2, rstd, dy2)
    return dx, _column_sum(partial, weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D], weight, bias [D] -> y [..., D] in x's dtype, mean and rstd [...] float32. D <= MAX_FUSED_WIDTH."""
    assert weight.shape == x.shape[-1:], f"weight {list(weight.shape)}, x {list(x.shape)}"
    assert x.shape[-1] <= common.MAX_FUSED_WIDTH, f"rows of {x.shape[-1]}"
    assert weight.is_contiguous()
    assert bias is None or (bias.shape == weight.shape and bias.is_contiguous())
    x2 = as_rows(x)
    rows, width = x2.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, mean, rstd
    tile = common.norm_tile(width)
    kernels.layer_norm_fwd[(common.cdiv(rows, tile.rows),)](
        x2, weight, bias, y, mean, rstd, x2.stride(0), rows, width, eps, ROWS=tile.rows, COLS=tile.cols, **tile.options
    )
    return y, mean, rstd


def layer_norm_bwd(
    x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, *, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x, dy [..., D], weight [D], mean, rstd [...] -> dx [..., D] in x's dtype, dw, db [D] in weight's; None if not
    needed."""
    assert any(needs), "a backward op that nothing needs"
    assert dy.shape == x.shape
    assert mean.shape == rstd.shape == x.shape[:-1]
    assert mean.is_contiguous()
    assert rstd.is_contiguous()
    assert weight.is_contiguous()
    x2, dy2 = as_rows(x), as_rows(dy)
    rows, width = x2.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    if rows == 0:
        none = torch.zeros_like(weight)
        return dx, none if needs[1] else None, none.clone() if needs[2] else None
    tile = common.norm_bwd_tile(width)
    # Without dw and db no program needs to live longer than its tile.
    programs = common.row_programs(rows, tile) if any(needs[1:]) else common.cdiv(rows, tile.rows)
    dw, db = (
        torch.empty(programs, width, dtype=torch.float32, device=x.device) if need else None for need in needs[1:]
    )
    kernels.layer_norm_bwd[(programs,)](
        x2,
        weight,
        mean,
        rstd,
        dy2,
        dx,
        dw,
        db,
        x2.stride(0),
        dy2.stride(0),
        rows,
        width,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )
    dweight, dbias = (None if partial is None else _column_sum(partial, weight.dtype) for partial in (dw, db))
    return dx, dweight, dbias


def _wide_partial(x: Tensor, rstd: Tensor, dy: Tensor) -> Tensor:
    """x, dy [rows, width], rstd [rows] -> [programs, width] float32: dy * x * rstd, summed over a program's rows."""
    rows, width = x.shape
    tile = common.column_tile()
    groups = min(common.cdiv(rows, tile.rows), common.MAX_WIDE_PROGRAMS)
    partial = torch.empty(groups, width, dtype=torch.float32, device=x.device)
    kernels.rms_norm_dw[(groups, common.cdiv(width, tile.cols))](
        x,
        rstd,
        dy,
        partial,
        x.stride(0),
        dy.stride(0),
        rows,
        width,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )
    return partial


def _column_sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """partial [programs, width] float32 -> [width]: the second stage of the reduction."""
    programs, width = partial.shape
    tile = common.column_tile()
    out = torch.empty(width, dtype=dtype, device=partial.device)
    kernels.column_sum[(common.cdiv(width, tile.cols),)](
        partial, out, programs, width, ROWS=tile.rows, COLS=tile.cols, **tile.options
    )
    return out
