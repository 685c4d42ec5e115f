"""Random numbers that are a pure function of (seed, step, micro-batch, site, element): masks, dropout, noise.

    m = (word >> 8) >= threshold,  y = m * factor * x,  u = ((2 (word >> 8) + 1 - 2^24) / 2^24) * bound

word: that number i % 4 of Philox4x32-10 of the counter (i // 4, site, step, micro-batch) under the key (seed low, seed
high), for element i in C order. Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011,
section 3.3. A mask takes no memory: backward makes it again.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow
from smedjan.backends.cuda_triton.kernels.elementwise import outer, tile


@triton.jit
def philox(index, key, site):
    """The four words, uint32, of each counter whose first word is `index`."""
    c0 = index.to(tl.uint32)
    none = tl.zeros_like(c0)
    c1 = none + site.to(tl.uint32)
    c2 = none + tl.load(key + 2).to(tl.uint32)
    c3 = none + tl.load(key + 3).to(tl.uint32)
    k0 = none + tl.load(key).to(tl.uint32)
    k1 = none + tl.load(key + 1).to(tl.uint32)
    one, two = tl.full(c0.shape, 0xD2511F53, tl.uint32), tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(one, c0), one * c0
        high1, low1 = tl.umulhi(two, c2), two * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full(c0.shape, 0x9E3779B9, tl.uint32)
        k1 += tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _words(key, site, COUNTERS: tl.constexpr):
    """[4 COUNTERS] words of this program's values"""
    counter = tl.program_id(0).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    word0, word1, word2, word3 = philox(counter, key, site)
    # Interleaved twice, the words of a counter stand one behind another.
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))


@triton.jit(do_not_specialize=["site", "threshold"])
def keep(x, key, y, site, threshold, factor, count, COUNTERS: tl.constexpr):
    """4 COUNTERS values of contiguous x and y; y is the mask itself where x is None."""
    word = _words(key, site, COUNTERS)
    kept = (word >> 8).to(tl.int32) >= threshold
    index = tl.program_id(0).to(tl.int64) * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS)
    inside = index < count
    if x is None:
        tl.store(y + index, kept.to(tl.float32), mask=inside)
    else:
        value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
        # A product, not a choice: a NaN that is dropped stays one, as in x * m.
        tl.store(y + index, narrow(value * tl.where(kept, factor, 0.0), y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["site"])
def uniform(key, y, site, bound, count, COUNTERS: tl.constexpr):
    """4 COUNTERS values of contiguous y"""
    word = _words(key, site, COUNTERS)
    odd = ((word >> 8) << 1).to(tl.int32) + (1 - 16777216)
    index = tl.program_id(0).to(tl.int64) * (4 * COUNTERS) + tl.arange(0, 4 * COUNTERS)
    tl.store(y + index, odd.to(tl.float32) * 5.9604644775390625e-08 * bound, mask=index < count)


@triton.jit(do_not_specialize=["site", "threshold", "rows", "blocks"])
def keep_strided(
    x,
    key,
    y,
    site,
    threshold,
    factor,
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
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS x COLS places of a contiguous y and any x: each draws its counter for itself and takes one word of four."""
    row, col, inside = tile(rows, width, blocks, ROWS, COLS)
    source = outer(row, size1, size2, x_stride0, x_stride1, x_stride2, DIMS)[:, None] + (col * x_stride)[None, :]
    index = row.to(tl.int64)[:, None] * width + col[None, :]
    word0, word1, word2, word3 = philox(index >> 2, key, site)
    lane = index & 3
    word = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    kept = (word >> 8).to(tl.int32) >= threshold
    value = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + index, narrow(value * tl.where(kept, factor, 0.0), y.dtype.element_ty), mask=inside)
