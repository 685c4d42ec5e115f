"""layer_norm, forward and backward. Its sums over rows end in `norm.column_sums`.

    y  = n * weight + bias,  n = (x - mean) * rstd,  rstd = rsqrt(mean((x - mean)^2) + eps)
    dx = rstd * (g - mean(g) - n * mean(g * n)) + acc,  g = dy * weight
    dw = sum over rows of dy * n;  db = sum over rows of dy

With `delta`, x is the sum total = x + factor * delta, rounded to its dtype first: add_layer_norm.

Rows lie as in `kernels/norm.py`. weight, bias, dw, db [width], mean, rstd [rows] float32. In float32; a row lies inside
one program, which subtracts the mean before it squares: E[x^2] - mean^2 would cancel. Ba, Kiros and Hinton, "Layer
Normalization", 2016.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow
from smedjan.backends.cuda_triton.kernels.norm import row_at, vector

MOST_HELD = tl.constexpr(8192)
"""Widest tile whose gradients stay in registers while a row is summed. Those of a wider one are read again, out of the
cache: beside normal and `acc` they fill 16 warps' registers, and ptxas spills some, under this Triton or that one."""


@triton.jit(do_not_specialize=["rows"])
def layer_norm_fwd(
    x,
    delta,
    weight,
    bias,
    total,
    y,
    mean,
    rstd,
    x_batch,
    x_head,
    x_token,
    delta_batch,
    delta_head,
    delta_token,
    total_batch,
    total_head,
    total_token,
    y_batch,
    y_head,
    y_token,
    heads,
    tokens,
    rows,
    width,
    eps,
    factor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """total, y, mean and rstd of ROWS rows; each may be None: not wanted. Without delta the norm is of x. bias may be
    None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = x + row_at(row, heads, tokens, x_batch, x_head, x_token) + col[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        at = delta + row_at(row, heads, tokens, delta_batch, delta_head, delta_token) + col[None, :]
        value += factor * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(value, x.dtype.element_ty)
        if total is not None:
            at = total + row_at(row, heads, tokens, total_batch, total_head, total_token) + col[None, :]
            tl.store(at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    middle = tl.sum(value, axis=1) / width
    apart = tl.where(inside, value - middle[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(apart * apart, axis=1) / width + eps)
    if y is not None:
        out = apart * inverse[:, None] * vector(weight, col, width)[None, :]
        if bias is not None:
            out += vector(bias, col, width)[None, :]
        at = y + row_at(row, heads, tokens, y_batch, y_head, y_token) + col[None, :]
        tl.store(at, narrow(out, y.dtype.element_ty), mask=inside)
    if mean is not None:
        tl.store(mean + row, middle, mask=row < rows)
    if rstd is not None:
        tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_bwd(
    x,
    weight,
    mean,
    rstd,
    dy,
    acc,
    dx,
    dw_partial,
    db_partial,
    x_batch,
    x_head,
    x_token,
    dy_batch,
    dy_head,
    dy_token,
    acc_batch,
    acc_head,
    acc_token,
    dx_batch,
    dx_head,
    dx_token,
    heads,
    tokens,
    rows,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx, and this program's row of the partial sums [programs, width] float32. acc and each of the three may be None:
    not wanted."""
    col = tl.arange(0, COLS)
    dw = tl.zeros([ROWS, COLS], dtype=tl.float32)
    db = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        middle = tl.load(mean + row, mask=row < rows, other=0.0)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        at = x + row_at(row, heads, tokens, x_batch, x_head, x_token) + col[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        # Not zero past the width, but grad is, and every sum is of products with it.
        normal = (value - middle[:, None]) * inverse[:, None]
        at = dy + row_at(row, heads, tokens, dy_batch, dy_head, dy_token) + col[None, :]
        grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if dw_partial is not None:
            dw += grad * normal
        if db_partial is not None:
            db += grad
        if dx is not None:
            grad = grad * vector(weight, col, width)[None, :]
            level = tl.sum(grad, axis=1) / width
            tilt = tl.sum(grad * normal, axis=1) / width
            if COLS > MOST_HELD:
                # Another policy, or the two loads would be made one.
                at = dy + row_at(row, heads, tokens, dy_batch, dy_head, dy_token) + col[None, :]
                grad = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
                grad = grad * vector(weight, col, width)[None, :]
            out = inverse[:, None] * (grad - level[:, None] - normal * tilt[:, None])
            if acc is not None:
                at = acc + row_at(row, heads, tokens, acc_batch, acc_head, acc_token) + col[None, :]
                out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            at = dx + row_at(row, heads, tokens, dx_batch, dx_head, dx_token) + col[None, :]
            tl.store(at, narrow(out, dx.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * width + col
    if dw_partial is not None:
        tl.store(dw_partial + at, tl.sum(dw, axis=0), mask=col < width)
    if db_partial is not None:
        tl.store(db_partial + at, tl.sum(db, axis=0), mask=col < width)
