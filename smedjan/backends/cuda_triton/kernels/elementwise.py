"""Arithmetic value by value over strided and broadcast operands, and the sums that undo a broadcast.

    scale  f x;  divide  x / f;  add_scalar  x + f;  square  x^2;  power  x^n;  rsqrt  x^(-1/2);  sign
    at_least  max(x, f);  at_most  min(x, f), where NaN stays NaN
    add  a + b;  sub  a - b;  mul  a b;  div  a / b;  rsqrt_bwd  -1/2 a b^3
    sum_over:  out[k] = sum over r of x[k, r]

float32 inside, one rounding to the result's dtype. Quotients are rounded correctly, as torch's are: such a kernel waits
for memory, and its accuracy costs no time.

A program has ROWS x COLS places. Columns are the innermost dim; a row's number counts through up to three outer dims,
each with a stride of its own for each operand (0 along what is broadcast), so that views, transposes and broadcasts
need no copy. `layout.walk` merges dims first: arrays that are contiguous are one row.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit
def outer(index, size1, size2, stride0, stride1, stride2, DIMS: tl.constexpr):
    """Offset of place `index` of up to three dims in C order, of which the last DIMS are more than one place."""
    if DIMS == 1:
        return index.to(tl.int64) * stride2
    elif DIMS == 2:
        return (index // size2).to(tl.int64) * stride1 + (index % size2).to(tl.int64) * stride2
    else:
        tl.static_assert(DIMS == 3)
        rest = index // size2
        near = (rest % size1).to(tl.int64) * stride1 + (index % size2).to(tl.int64) * stride2
        return (rest // size1).to(tl.int64) * stride0 + near


@triton.jit
def tile(rows, width, blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(row [ROWS], col [COLS] int64, inside [ROWS, COLS]) of this program; program = row tile * blocks + block."""
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    return row, col, (row < rows)[:, None] & (col < width)[None, :]


@triton.jit(do_not_specialize=["rows", "blocks"])
def unary(
    x,
    y,
    number,
    x_stride0,
    x_stride1,
    x_stride2,
    x_stride,
    y_stride0,
    y_stride1,
    y_stride2,
    y_stride,
    size1,
    size2,
    rows,
    width,
    blocks,
    OP: tl.constexpr,
    POWER: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = OP(x), with the constant `number`, or the exponent POWER, where OP has one."""
    row, col, inside = tile(rows, width, blocks, ROWS, COLS)
    source = outer(row, size1, size2, x_stride0, x_stride1, x_stride2, DIMS)[:, None] + (col * x_stride)[None, :]
    target = outer(row, size1, size2, y_stride0, y_stride1, y_stride2, DIMS)[:, None] + (col * y_stride)[None, :]
    value = tl.load(x + source, mask=inside, other=0)
    if OP == "copy":
        tl.store(y + target, value, mask=inside)
    else:
        tl.store(y + target, narrow(_unary(value.to(tl.float32), number, OP, POWER), y.dtype.element_ty), mask=inside)


@triton.jit
def _unary(x, number, OP: tl.constexpr, POWER: tl.constexpr):
    if OP == "cast":
        return x
    elif OP == "scale":
        return x * number
    elif OP == "divide":
        return tl.div_rn(x, tl.zeros_like(x) + number)
    elif OP == "add_scalar":
        return x + number
    elif OP == "rsqrt":
        return tl.rsqrt(x)
    elif OP == "sign":
        return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
    elif OP == "at_least":
        return tl.where(x < number, number, x)
    elif OP == "at_most":
        return tl.where(x > number, number, x)
    else:
        tl.static_assert(OP == "power")
        return _power(x, POWER)


@triton.jit
def _power(x, POWER: tl.constexpr):
    """x^POWER by repeated products, as torch multiplies its squares and cubes."""
    value = tl.zeros_like(x) + 1.0
    for _ in tl.static_range(POWER if POWER > 0 else -POWER):
        value = value * x
    if POWER < 0:
        value = tl.div_rn(tl.zeros_like(x) + 1.0, value)
    return value


@triton.jit(do_not_specialize=["rows", "blocks"])
def binary(
    a,
    b,
    y,
    a_stride0,
    a_stride1,
    a_stride2,
    a_stride,
    b_stride0,
    b_stride1,
    b_stride2,
    b_stride,
    y_stride0,
    y_stride1,
    y_stride2,
    y_stride,
    size1,
    size2,
    rows,
    width,
    blocks,
    OP: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = OP(a, b)"""
    row, col, inside = tile(rows, width, blocks, ROWS, COLS)
    first = outer(row, size1, size2, a_stride0, a_stride1, a_stride2, DIMS)[:, None] + (col * a_stride)[None, :]
    second = outer(row, size1, size2, b_stride0, b_stride1, b_stride2, DIMS)[:, None] + (col * b_stride)[None, :]
    target = outer(row, size1, size2, y_stride0, y_stride1, y_stride2, DIMS)[:, None] + (col * y_stride)[None, :]
    one = tl.load(a + first, mask=inside, other=0).to(tl.float32)
    two = tl.load(b + second, mask=inside, other=0).to(tl.float32)
    tl.store(y + target, narrow(_binary(one, two, OP), y.dtype.element_ty), mask=inside)


@triton.jit
def _binary(a, b, OP: tl.constexpr):
    if OP == "add":
        return a + b
    elif OP == "sub":
        return a - b
    elif OP == "mul":
        return a * b
    elif OP == "div":
        return tl.div_rn(a, b)
    elif OP == "rsqrt_bwd":
        return -0.5 * a * (b * b * b)
    elif OP == "tanh_bwd":
        # (1 - y) (1 + y) keeps the digits that 1 - y^2 loses where y is near 1.
        return a * ((1.0 - b) * (1.0 + b))
    else:
        tl.static_assert(OP == "relu_bwd")
        return tl.where(b > 0.0, a, 0.0)


@triton.jit
def fill(y, value, count, COLS: tl.constexpr):
    """y = value"""
    index = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    tl.store(y + index, narrow(tl.zeros([COLS], dtype=tl.float32) + value, y.dtype.element_ty), mask=index < count)


@triton.jit(do_not_specialize=["share"])
def sum_over(
    x,
    out,
    kept_stride0,
    kept_stride1,
    kept_stride2,
    stride0,
    stride1,
    stride2,
    kept1,
    kept2,
    size1,
    size2,
    kept,
    reduced,
    share,
    KEPT_DIMS: tl.constexpr,
    DIMS: tl.constexpr,
    KEPT: tl.constexpr,
    REDUCED: tl.constexpr,
):
    """out[split, k] = sum of x[k, r] over the `share` tiles of r of this split, always in one order; k and r each count
    through up to three dims of x. Programs: blocks of k by splits."""
    k = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    there = outer(k, kept1, kept2, kept_stride0, kept_stride1, kept_stride2, KEPT_DIMS)
    first = tl.program_id(1) * share
    total = tl.zeros([KEPT, REDUCED], dtype=tl.float32)
    for step in range(first, tl.minimum(first + share, tl.cdiv(reduced, REDUCED))):
        r = step * REDUCED + tl.arange(0, REDUCED)
        inside = (k < kept)[:, None] & (r < reduced)[None, :]
        at = there[:, None] + outer(r, size1, size2, stride0, stride1, stride2, DIMS)[None, :]
        total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    target = out + tl.program_id(1).to(tl.int64) * kept + k
    tl.store(target, narrow(tl.sum(total, axis=1), out.dtype.element_ty), mask=k < kept)
