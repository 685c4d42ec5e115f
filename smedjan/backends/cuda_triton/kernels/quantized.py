"""Weights of 4 and 8 bits: widened, quantised, and multiplied without being widened in memory.

NF4 (`checkpoint/nf4.py`), n values in memory order, 64 to a block, 16,384 to a nested block:

    scale[b] = DYNAMIC[absmax[b]] * nested[b / 256] + offset
    w[i]     = NORMAL[code[i]] * scale[i / 64]

    y = x w^T + bias       x [rows, I], w [O, I] by NF4, or codes int8 [O, I] times scale [O]; y [rows, O]

`normal` and `dynamic` are the two tables, float32 [16] and [256] in global memory: 32 threads read 32 entries of a
64-byte table from L1 in one cycle, where selecting among 16 registers would take more instructions than that.

The products are for few rows, where reading the weight is all the time: a program has a few rows of w, walks along
them, and multiplies each value that it decodes by ROWS rows of x.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow
from smedjan.checkpoint import nf4

BLOCK = tl.constexpr(nf4.BLOCK)
BYTES = tl.constexpr(nf4.BLOCK // 2)
NESTED_BLOCK = tl.constexpr(nf4.NESTED_BLOCK)
TINIEST = tl.constexpr(float(nf4.TINIEST))
BOUNDS = tl.constexpr(tuple(float(bound) for bound in nf4.BOUNDS))


@triton.jit
def _scale(absmax, nested, offset, dynamic, block, inside):
    """The scales of these blocks; bitsandbytes' bits where the launch forbids fused multiply-adds."""
    code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    largest = tl.load(nested + block // NESTED_BLOCK, mask=inside, other=0.0)
    return tl.load(dynamic + code) * largest + tl.load(offset)


@triton.jit
def _decoded(codes, normal, byte, inside):
    """NORMAL of the two codes of each byte: the first, the second."""
    both = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    return tl.load(normal + (both >> 4)), tl.load(normal + (both & 15))


@triton.jit
def nf4_dequantize(codes, absmax, nested, offset, normal, dynamic, out, values, bytes, blocks, BLOCKS: tl.constexpr):
    """`out` [values] of BLOCKS blocks. The last block may be short, and the last byte half."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = _scale(absmax, nested, offset, dynamic, block, block < blocks)
    byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    first, second = _decoded(codes, normal, byte, byte < bytes)
    value = tl.reshape(tl.join(first * scale[:, None], second * scale[:, None]), [BLOCKS, BLOCK])
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask=at < values)


@triton.jit
def nf4_quantize(weight, codes, absmax, values, bytes, blocks, BLOCKS: tl.constexpr):
    """Codes and scales of BLOCKS blocks. A short last one is divided by its scale, as in bitsandbytes' CPU build."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(weight + at, mask=at < values, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=1)
    short = (block + 1) * BLOCK > values
    # Of its dtype by name: 3.6 and 3.7 take a number below 2^-126 for a float64, and the quotient with it.
    divisor = tl.maximum(largest, tl.full(largest.shape, TINIEST, tl.float32))
    tl.store(absmax + block, tl.where(short, divisor, largest), mask=block < blocks)
    whole = value * tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)[:, None]
    scaled = tl.where(short[:, None], tl.div_rn(value, tl.broadcast_to(divisor[:, None], value.shape)), whole)
    code = tl.zeros(scaled.shape, tl.int32)
    for index in tl.static_range(15):
        code += (scaled > BOUNDS[index]).to(tl.int32)
    first, second = tl.split(tl.reshape(code, [BLOCKS, BYTES, 2]))
    byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    tl.store(codes + byte, (first << 4 | second).to(tl.uint8), mask=byte < bytes)


@triton.jit
def _finish(total, bias, y, y_stride, row, rows, column, outs):
    """total + bias, stored."""
    inside = (row < rows)[:, None] & (column < outs)[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=column < outs, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * y_stride + column[None, :], narrow(total, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def nf4_linear(
    x,
    codes,
    absmax,
    nested,
    offset,
    bias,
    normal,
    dynamic,
    y,
    x_stride,
    y_stride,
    rows,
    outs,
    blocks,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """y of ROWS x OUTS. A row of w is `blocks` whole blocks, of which a step takes BLOCKS. bias may be None."""
    column = tl.program_id(0).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, OUTS, BLOCKS, BYTES], tl.float32)
    # Four dims from the first load on, and a thread's 4 bytes of w beside its 8 values of x: the two lie in registers
    # as they meet, and no step of the loop goes through shared memory. What is in flight is OUTS rows of w.
    each = tl.arange(0, BYTES)[None, None, None, :]
    for start in range(0, blocks, BLOCKS):
        within = start + tl.arange(0, BLOCKS)[None, None, :, None]
        inside = (column < outs)[None, :, None, None] & (within < blocks)
        block = column[None, :, None, None] * blocks + within
        scale = _scale(absmax, nested, offset, dynamic, block, inside)
        byte = tl.max_contiguous(block * BYTES + each, (1, 1, 1, 4))
        first, second = _decoded(codes, normal, byte, inside)
        at = row[:, None, None, None] * x_stride + within * BLOCK + tl.arange(0, BLOCK)[None, None, None, :]
        known = (row < rows)[:, None, None, None] & (within < blocks)
        value = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
        left, right = tl.split(tl.reshape(value, [ROWS, 1, BLOCKS, BYTES, 2]))
        total += (first * left + second * right) * scale
    total = tl.sum(tl.reshape(total, [ROWS, OUTS, BLOCKS * BYTES]), axis=2)
    _finish(total, bias, y, y_stride, row, rows, column, outs)


@triton.jit(do_not_specialize=["rows"])
def int8_linear(
    x,
    codes,
    scale,
    bias,
    y,
    x_stride,
    y_stride,
    rows,
    outs,
    width,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y of ROWS x OUTS: the sum over a row of codes, times its scale at the end. bias may be None."""
    column = tl.program_id(0).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, OUTS, COLS], tl.float32)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)[None, None, :]
        inside = (column < outs)[None, :, None] & (col < width)
        at = tl.max_contiguous(column[None, :, None] * width + col, (1, 1, 8))
        code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
        known = (row < rows)[:, None, None] & (col < width)
        value = tl.load(x + row[:, None, None] * x_stride + col, mask=known, other=0.0).to(tl.float32)
        total += code * value
    each = tl.load(scale + column, mask=column < outs, other=0.0)
    _finish(tl.sum(total, axis=2) * each[None, :], bias, y, y_stride, row, rows, column, outs)
