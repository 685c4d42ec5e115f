"""Attention of a few new tokens over a cache: the keys are split among programs, whose shares a second kernel joins.

One query gives a tile of queries nothing to do, and a batch's heads are too few programs for a GPU: so the queries of a
group (its query heads times the new tokens) are the rows of one tile, which reads each key and value once for all of
them, and the filled part of the cache is cut into SPLITS equal runs of tiles ("Flash-Decoding", Dao et al., 2023).

A program's share is the online softmax's m, `total` and sums over its own keys (`kernels/attention.py`). Shares join as

    y = sum_i 2^(m_i - m) sums_i / (exp(sink) + sum_i 2^(m_i - m) total_i),    m = max(m_i, sink log2(e))

How many keys there are is the device's to know: `length`, the new tokens counted, of which query t stands at place
length - T + t. The grid does not depend on it. Rows of a tile are member * T + t, for the group's query head `member`.
A paged cache (PAGE > 0) is [pages, K, PAGE, D]; key j lies at place j % PAGE of page block_table[b, j // PAGE].
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.attention import LOG2_E, LOWEST, squash
from smedjan.backends.cuda_triton.kernels.common import dot, narrow


@triton.jit
def _rows(base, place, inside, FIRST: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr):
    """x[place, FIRST : FIRST + COLS], rows at any distance; zero where not `inside` and past DIM columns."""
    col = FIRST + tl.arange(0, COLS)
    return tl.load(base + place[:, None] + col[None, :], mask=inside[:, None] & (col < DIM)[None, :], other=0.0)


@triton.jit
def _store(base, place, inside, value, FIRST: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr):
    col = FIRST + tl.arange(0, COLS)
    at = base + place[:, None] + col[None, :]
    tl.store(at, narrow(value, base.dtype.element_ty), mask=inside[:, None] & (col < DIM)[None, :])


@triton.jit(do_not_specialize=["queries", "keys", "pages", "length_stride"])
def attention_decode(
    q,
    k,
    v,
    key_mask,
    block_table,
    length,
    sinks,
    y,
    sums,
    statistics,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    y_batch,
    y_head,
    y_token,
    queries,
    keys,
    pages,
    length_stride,
    inner,
    factor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One split of a tile of rows of one key head; program (split, key head, batch * tiles + tile).

    Of one split, y; of several, sums [B, A, T, SPLITS, D] and statistics [2, B, A, T, SPLITS] (m, total), float32.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    tiles_m = tl.cdiv(GROUP * queries, BLOCK_M)
    batch = (tl.program_id(2) // tiles_m).to(tl.int64)
    row = tl.program_id(2) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < GROUP * queries
    token = row % queries
    head = kv_head * GROUP + tl.minimum(row // queries, GROUP - 1)
    filled = tl.load(length + batch * length_stride).to(tl.int32)
    high = filled - queries + token + 1

    q += batch * q_batch
    place = head * q_head + token * q_token
    q_main = _rows(q, place, real, 0, HEAD, DIM)
    acc = tl.zeros([BLOCK_M, HEAD], dtype=tl.float32)
    if TAIL > 0:
        q_tail = _rows(q, place, real, HEAD, TAIL, DIM)
        acc_tail = tl.zeros([BLOCK_M, TAIL], dtype=tl.float32)
    m = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if SPLITS == 1 and sinks is not None:
        m = tl.load(sinks + head).to(tl.float32) * LOG2_E
        total += 1.0

    first = 0
    if WINDOW > 0:
        first = tl.maximum(filled - queries - WINDOW + 1, 0) // BLOCK_N
    last = tl.cdiv(filled, BLOCK_N)
    share = tl.cdiv(last - first, SPLITS)
    k += kv_head * k_head
    v += kv_head * v_head
    if PAGE == 0:
        k += batch * k_batch
        v += batch * v_batch
    for tile in range(first + split * share, tl.minimum(first + (split + 1) * share, last)):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = key < filled
        if PAGE > 0:
            page = tl.load(block_table + batch * pages + key // PAGE, mask=inside, other=0).to(tl.int64)
            k_place = page * k_batch + key % PAGE * k_token
            v_place = page * v_batch + key % PAGE * v_token
        else:
            k_place = key.to(tl.int64) * k_token
            v_place = key.to(tl.int64) * v_token
        s = dot(q_main, tl.trans(_rows(k, k_place, inside, 0, HEAD, DIM)))
        if TAIL > 0:
            s = dot(q_tail, tl.trans(_rows(k, k_place, inside, HEAD, TAIL, DIM)), s)
        if CAPPED:
            s = squash(s * inner, q.dtype.element_ty)
        seen = key[None, :] < high[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] >= high[:, None] - WINDOW)
        if key_mask is not None:
            seen = seen & (tl.load(key_mask + batch * keys + key, mask=inside, other=0) != 0)[None, :]
        s = tl.where(seen, s, -float("inf"))
        peak = tl.maximum(m, tl.max(s, axis=1) * factor)
        p = tl.exp2(s * factor - peak[:, None])
        rescale = tl.exp2(m - peak)
        total = total * rescale + tl.sum(p, axis=1)
        m = peak
        p = narrow(p, v.dtype.element_ty)
        acc = dot(p, _rows(v, v_place, inside, 0, HEAD, DIM), acc * rescale[:, None])
        if TAIL > 0:
            acc_tail = dot(p, _rows(v, v_place, inside, HEAD, TAIL, DIM), acc_tail * rescale[:, None])

    if SPLITS == 1:
        inverse = (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
        y += batch * y_batch
        place = head * y_head + token * y_token
        _store(y, place, real, acc * inverse, 0, HEAD, DIM)
        if TAIL > 0:
            _store(y, place, real, acc_tail * inverse, HEAD, TAIL, DIM)
    else:
        heads = tl.num_programs(1) * GROUP
        place = ((batch * heads + head) * queries + token) * SPLITS + split
        _store(sums, place * DIM, real, acc, 0, HEAD, DIM)
        if TAIL > 0:
            _store(sums, place * DIM, real, acc_tail, HEAD, TAIL, DIM)
        every = (tl.num_programs(2) // tiles_m).to(tl.int64) * heads * queries * SPLITS
        tl.store(statistics + place, m, mask=real)
        tl.store(statistics + every + place, total, mask=real)


@triton.jit(do_not_specialize=["queries"])
def attention_join(
    sums,
    statistics,
    sinks,
    y,
    y_batch,
    y_head,
    y_token,
    queries,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """y of one row out of its SPLITS shares; program = (batch * HEADS + head) * T + token."""
    row = tl.program_id(0).to(tl.int64)
    token = row % queries
    head = row // queries % HEADS
    batch = row // queries // HEADS
    split = tl.arange(0, SPLITS)
    col = tl.arange(0, COLS)
    m = tl.load(statistics + row * SPLITS + split)
    total = tl.load(statistics + (tl.num_programs(0) + row) * SPLITS + split)
    peak = tl.max(m, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        peak = tl.maximum(peak, sink)
    rescale = tl.exp2(m - peak)
    total = tl.sum(total * rescale, axis=0)
    if sinks is not None:
        total += tl.exp2(sink - peak)
    place = sums + (row * SPLITS + split)[:, None] * DIM + col[None, :]
    acc = tl.sum(tl.load(place, mask=(col < DIM)[None, :], other=0.0) * rescale[:, None], axis=0)
    out = acc / tl.where(total > 0.0, total, 1.0)
    at = y + batch * y_batch + head * y_head + token * y_token + col
    tl.store(at, narrow(out, y.dtype.element_ty), mask=col < DIM)
