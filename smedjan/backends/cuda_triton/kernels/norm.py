"""rms_norm: forward, backward, and the sums over rows that the gradients of a norm's weight and bias need.

    y  = n * (offset + weight),  n = x * rstd,  rstd = rsqrt(mean(x^2) + eps)
    dx = rstd * (g - n * mean(g * n)) + acc,  g = dy * (offset + weight)
    dw = sum over rows of dy * n

With `delta`, x is the sum total = x + factor * delta, rounded to its dtype first: add_rms_norm.

x, delta, total, y, dy, dx, acc are rows of `width` values: row (batch * heads + head) * tokens + token lies at three
strides, so that heads which were moved to the front are read where they are. Rows at one stride have heads = tokens =
1, a value that Triton compiles in: nothing is divided. weight, dw [width], rstd [rows] float32. Everything is computed
in float32; a row lies inside one program. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; the split
of dw into partial sums per program, then one reduction, is that of Triton's layer-norm tutorial, without its locks and
without atomics.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit
def row_at(row, heads, tokens, batch_stride, head_stride, token_stride):
    """Where each row begins, [ROWS, 1]."""
    batch, head, token = row // (heads * tokens), row // tokens % heads, row % tokens
    at = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride + token.to(tl.int64) * token_stride
    return at[:, None]


@triton.jit
def vector(at, col, width):
    """[width] at `at`, in float32, as a tile's columns; zero beyond."""
    return tl.load(at + col, mask=col < width, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_fwd(
    x,
    delta,
    weight,
    total,
    y,
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
    offset,
    factor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CAST_BEFORE: tl.constexpr,
):
    """total, y and rstd of ROWS rows; each may be None: not wanted. Without delta the norm is of x.

    CAST_BEFORE rounds n to x's dtype before the weight (Llama), else after it (Gemma)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = x + row_at(row, heads, tokens, x_batch, x_head, x_token) + col[None, :]
    # Upcast at once, here and everywhere: Triton's interpreter computes on bfloat16's bits as integers.
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        at = delta + row_at(row, heads, tokens, delta_batch, delta_head, delta_token) + col[None, :]
        value += factor * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(value, x.dtype.element_ty)
        if total is not None:
            at = total + row_at(row, heads, tokens, total_batch, total_head, total_token) + col[None, :]
            tl.store(at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
    if y is not None:
        normal = value * inverse[:, None]
        if CAST_BEFORE:
            normal = narrow(normal, x.dtype.element_ty).to(tl.float32)
        out = normal * (offset + vector(weight, col, width))[None, :]
        at = y + row_at(row, heads, tokens, y_batch, y_head, y_token) + col[None, :]
        tl.store(at, narrow(out, y.dtype.element_ty), mask=inside)
    if rstd is not None:
        tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_bwd(
    x,
    weight,
    rstd,
    dy,
    acc,
    dx,
    dw_partial,
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
    offset,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx, and this program's row of dw_partial [programs, width] float32. acc and each of the two may be None: not
    wanted."""
    col = tl.arange(0, COLS)
    # With dw a program lives for many tiles and keeps the scale in registers. Without, dx of a wide row needs those.
    if dw_partial is not None:
        scale = offset + vector(weight, col, width)
    dw = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        at = x + row_at(row, heads, tokens, x_batch, x_head, x_token) + col[None, :]
        normal = tl.load(at, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
        at = dy + row_at(row, heads, tokens, dy_batch, dy_head, dy_token) + col[None, :]
        grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if dw_partial is not None:
            dw += grad * normal
        if dx is not None:
            if dw_partial is None:
                scale = offset + vector(weight, col, width)
            grad = grad * scale[None, :]
            tilt = tl.sum(grad * normal, axis=1) / width
            out = inverse[:, None] * (grad - normal * tilt[:, None])
            if acc is not None:
                at = acc + row_at(row, heads, tokens, acc_batch, acc_head, acc_token) + col[None, :]
                out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            at = dx + row_at(row, heads, tokens, dx_batch, dx_head, dx_token) + col[None, :]
            tl.store(at, narrow(out, dx.dtype.element_ty), mask=inside)
    if dw_partial is not None:
        at = dw_partial + tl.program_id(0).to(tl.int64) * width + col
        tl.store(at, tl.sum(dw, axis=0), mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def wide_partials(
    x,
    mean,
    rstd,
    dy,
    dw_partial,
    db_partial,
    x_batch,
    x_head,
    x_token,
    dy_batch,
    dy_head,
    dy_token,
    heads,
    tokens,
    rows,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A tile of columns of one row of each of the partial sums [programs, width] of dy * (x - mean) * rstd and of dy:
    for rows too wide for the kernels that make dx. mean None: 0. Either sum may be None: not wanted."""
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    dw = tl.zeros([ROWS, COLS], dtype=tl.float32)
    db = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        at = dy + row_at(row, heads, tokens, dy_batch, dy_head, dy_token) + col[None, :]
        grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if dw_partial is not None:
            at = x + row_at(row, heads, tokens, x_batch, x_head, x_token) + col[None, :]
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if mean is not None:
                value -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
            dw += grad * (value * tl.load(rstd + row, mask=row < rows, other=0.0)[:, None])
        if db_partial is not None:
            db += grad
    at = tl.program_id(0).to(tl.int64) * width + col
    if dw_partial is not None:
        tl.store(dw_partial + at, tl.sum(dw, axis=0), mask=col < width)
    if db_partial is not None:
        tl.store(db_partial + at, tl.sum(db, axis=0), mask=col < width)


@triton.jit(do_not_specialize=["first_rows", "second_rows"])
def column_sums(
    partial,
    first,
    second,
    first_rows,
    second_rows,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The second stage, of both of a norm's gradients at once: partial [first_rows + second_rows, width] float32.

    first[col] = sum of the first rows, second[col] = sum of the others, always in the same order. second may be None.
    """
    which = tl.program_id(1)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    start, stop = which * first_rows, first_rows + which * second_rows
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for block in range(start, stop, ROWS):
        row = block + tl.arange(0, ROWS)
        inside = (row < stop)[:, None] & (col < width)[None, :]
        total += tl.load(partial + row[:, None].to(tl.int64) * width + col[None, :], mask=inside, other=0.0)
    value = tl.sum(total, axis=0)
    if which == 0:
        tl.store(first + col, narrow(value, first.dtype.element_ty), mask=col < width)
    elif second is not None:
        tl.store(second + col, narrow(value, second.dtype.element_ty), mask=col < width)
