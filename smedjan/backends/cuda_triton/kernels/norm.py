"""rms_norm and layer_norm: forward, backward, and the sums over rows that the gradients of their weights need.

    y  = n * (offset + weight),  n = x * rstd,  rstd = rsqrt(mean(x^2) + eps)
    dx = rstd * (g - n * mean(g * n)) + acc,  g = dy * (offset + weight)
    dw = sum over rows of dy * n

    y  = n * weight + bias,  n = (x - mean) * rstd,  rstd = rsqrt(mean((x - mean)^2) + eps)
    dx = rstd * (g - mean(g) - n * mean(g * n)),  g = dy * weight
    dw = sum over rows of dy * n;  db = sum over rows of dy

x, y, dy, dx, acc [rows, width], weight, bias, dw, db [width], mean, rstd [rows] float32. Everything is computed in
float32; a row lies inside one program, which subtracts the mean before it squares: E[x^2] - mean^2 would cancel. Zhang
and Sennrich, "Root Mean Square Layer Normalization", 2019; Ba, Kiros and Hinton, "Layer Normalization", 2016; the split
of dw into partial sums per program, then one reduction, is that of Triton's layer-norm tutorial, without its locks and
without atomics.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit
def _scale(weight, col, width, offset):
    """offset + weight, in float32."""
    return tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32) + offset


@triton.jit(do_not_specialize=["rows"])
def rms_norm_fwd(
    x,
    weight,
    y,
    rstd,
    x_stride,
    rows,
    width,
    eps,
    offset,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CAST_BEFORE: tl.constexpr,
):
    """y and rstd of ROWS rows. CAST_BEFORE rounds n to x's dtype before the weight (Llama), else after it (Gemma)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    # Upcast at once, here and everywhere: Triton's interpreter computes on bfloat16's bits as integers.
    value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = _scale(weight, col, width, offset)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
    normal = value * inverse[:, None]
    if CAST_BEFORE:
        normal = narrow(normal, x.dtype.element_ty).to(tl.float32)
    out = narrow(normal * scale[None, :], y.dtype.element_ty)
    tl.store(y + row[:, None] * width + col[None, :], out, mask=inside)
    tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_bwd(
    x,
    weight,
    rstd,
    dy,
    acc,
    dx,
    partial,
    x_stride,
    dy_stride,
    acc_stride,
    rows,
    width,
    offset,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx, and this program's row of `partial` [programs, width] float32. acc, dx or partial may be None: not wanted."""
    col = tl.arange(0, COLS)
    # With dw a program lives for many tiles and keeps the scale in registers. Without, dx of a wide row needs those.
    if partial is not None:
        scale = _scale(weight, col, width, offset)
    dw = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        normal = value * inverse[:, None]
        grad = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if partial is not None:
            dw += grad * normal
        if dx is not None:
            if partial is None:
                scale = _scale(weight, col, width, offset)
            grad = grad * scale[None, :]
            mean = tl.sum(grad * normal, axis=1) / width
            out = inverse[:, None] * (grad - normal * mean[:, None])
            if acc is not None:
                waiting = tl.load(acc + row[:, None] * acc_stride + col[None, :], mask=inside, other=0.0)
                out += waiting.to(tl.float32)
            tl.store(dx + row[:, None] * width + col[None, :], narrow(out, dx.dtype.element_ty), mask=inside)
    if partial is not None:
        at = partial + tl.program_id(0).to(tl.int64) * width + col
        tl.store(at, tl.sum(dw, axis=0), mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_dw(
    x,
    rstd,
    dy,
    partial,
    x_stride,
    dy_stride,
    rows,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A tile of columns of one row of `partial` [programs, width]: dw alone, for rows too wide for `rms_norm_bwd`."""
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    dw = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        dw += grad * (value * inverse[:, None])
    tl.store(partial + tl.program_id(0).to(tl.int64) * width + col, tl.sum(dw, axis=0), mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_fwd(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    x_stride,
    rows,
    width,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y, mean and rstd of ROWS rows. bias may be None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    middle = tl.sum(value, axis=1) / width
    apart = tl.where(inside, value - middle[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(apart * apart, axis=1) / width + eps)
    scale = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)
    out = apart * inverse[:, None] * scale[None, :]
    if bias is not None:
        out += tl.load(bias + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * width + col[None, :], narrow(out, y.dtype.element_ty), mask=inside)
    tl.store(mean + row, middle, mask=row < rows)
    tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_bwd(
    x,
    weight,
    mean,
    rstd,
    dy,
    dx,
    dw_partial,
    db_partial,
    x_stride,
    dy_stride,
    rows,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx, and this program's row of the partial sums [programs, width] float32. Each of the three may be None."""
    col = tl.arange(0, COLS)
    scale = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, COLS], dtype=tl.float32)
    db = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        middle = tl.load(mean + row, mask=row < rows, other=0.0)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        normal = tl.where(inside, (value - middle[:, None]) * inverse[:, None], 0.0)
        grad = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if dw_partial is not None:
            dw += grad * normal
        if db_partial is not None:
            db += grad
        if dx is not None:
            grad = grad * scale[None, :]
            level = tl.sum(grad, axis=1) / width
            tilt = tl.sum(grad * normal, axis=1) / width
            out = inverse[:, None] * (grad - level[:, None] - normal * tilt[:, None])
            tl.store(dx + row[:, None] * width + col[None, :], narrow(out, dx.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * width + col
    if dw_partial is not None:
        tl.store(dw_partial + at, tl.sum(dw, axis=0), mask=col < width)
    if db_partial is not None:
        tl.store(db_partial + at, tl.sum(db, axis=0), mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def column_sum(partial, out, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[col] = sum over rows of partial[row, col], always in the same order."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        total += tl.load(partial + row[:, None] * width + col[None, :], mask=inside, other=0.0)
    tl.store(out + col, narrow(tl.sum(total, axis=0), out.dtype.element_ty), mask=col < width)
