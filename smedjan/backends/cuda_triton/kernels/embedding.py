"""Rows picked by index, and their gradients: a scatter where an index occurs once, else sums in the order of tokens.

    gather_rows   y[i] = x[index[i]]
    scatter_rows  y[index[i]] = x[i], each index once
    rank          order[p] = token, id_at[p] = its id, p = number of ids that are smaller, or equal and earlier
    sum_rows      dweight[v] = sum of dy[t] over the tokens t whose id is v, earliest first

A token's gradient row may have to be added to others': a vocabulary's rows are far more than a batch's tokens, and few
tokens share an id. Atomic adds would make the order of a sum, hence its bits, a matter of chance, and a sort of aten's
allocates. `rank` is that sort: a token's place among all, counted, tokens^2 compares that the lanes of a GPU share (16
million for 4096 tokens, some microseconds; 0.1 ms at 32k). Equal ids then lie one behind another, and the program of a
run's first token sums it in float32.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit(do_not_specialize=["rows", "blocks"])
def gather_rows(x, index, y, x_stride, y_stride, rows, width, blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ROWS rows of y, COLS columns of each; program = row tile * blocks + block."""
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    source = tl.load(index + row, mask=row < rows, other=0).to(tl.int64) * x_stride
    value = tl.load(x + source[:, None] + col[None, :], mask=inside, other=0)
    tl.store(y + row.to(tl.int64)[:, None] * y_stride + col[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["rows", "blocks"])
def scatter_rows(x, index, y, x_stride, y_stride, rows, width, blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ROWS rows of x, likewise."""
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    target = tl.load(index + row, mask=row < rows, other=0).to(tl.int64) * y_stride
    value = tl.load(x + row.to(tl.int64)[:, None] * x_stride + col[None, :], mask=inside, other=0)
    tl.store(y + target[:, None] + col[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def rank(ids, order, id_at, tokens, TOKENS: tl.constexpr, OTHERS: tl.constexpr):
    """The places of TOKENS tokens. No two tokens share one."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mine = tl.load(ids + token, mask=token < tokens, other=0).to(tl.int32)
    place = tl.zeros([TOKENS], dtype=tl.int32)
    for start in range(0, tokens, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = tl.load(ids + other, mask=other < tokens, other=0).to(tl.int32)
        smaller = theirs[None, :] < mine[:, None]
        earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < token[:, None])
        before = (smaller | earlier) & (other < tokens)[None, :]
        place += tl.sum(before.to(tl.int32), axis=1)
    tl.store(order + place, token, mask=token < tokens)
    tl.store(id_at + place, mine, mask=token < tokens)


@triton.jit(do_not_specialize=["tokens", "blocks", "padding"])
def sum_rows(
    dy,
    order,
    id_at,
    dweight,
    dy_stride,
    tokens,
    width,
    blocks,
    padding,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    """COLS columns of the row of dweight whose run begins at place program // blocks; the others end at once.

    TOKENS rows of dy are read at a time. `padding` is an id that gets no gradient, or -1.
    """
    place = tl.program_id(0) // blocks
    mine = tl.load(id_at + place)
    before = tl.load(id_at + place - 1, mask=place > 0, other=-1)
    if (mine != before) & (mine != padding):
        col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
        total = tl.zeros([TOKENS, COLS], dtype=tl.float32)
        more = 1
        while more > 0:
            at = place + tl.arange(0, TOKENS)
            same = tl.load(id_at + at, mask=at < tokens, other=-1) == mine
            token = tl.load(order + at, mask=same, other=0).to(tl.int64)
            inside = same[:, None] & (col < width)[None, :]
            total += tl.load(dy + token[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
            more = tl.min(same.to(tl.int32), axis=0)
            place += TOKENS
        target = dweight + mine.to(tl.int64) * width + col
        tl.store(target, narrow(tl.sum(total, axis=0), dweight.dtype.element_ty), mask=col < width)
