"""Attention, forward: a tile of queries meets the keys tile by tile, and the scores are never in memory.

    s = scale q k^T, capped: cap tanh(s / cap)
    y = sum_j exp(s_j - lse) v_j,    lse = log(exp(sink) + sum_j exp(s_j)),    j over the keys that the query sees

The sum is the online softmax's (Milakov and Gimelshein 2018, algorithm 3; Dao et al., "FlashAttention", 2022; Dao,
"FlashAttention-2", 2023, algorithm 1): of the keys so far, m is the largest score and `total` the sum of exp(s - m);
where a tile raises m, what was summed is scaled by exp(old m - m). Exponentials are powers of two of scores that
log2(e) is multiplied into, in one fused multiply-add. s, m, total and the sums are float32; exp(s - m) is rounded to
v's dtype before it meets v. A sink is a key's score without a value: m begins there, and the total at 1.

What masks say is one interval [low, high) of keys for each query, because it is one for each of them: causal, a window,
documents, the ragged end. Tiles that no query of a program sees are not loaded; tiles of which every query sees every
key (`whole` to `ragged`) are not masked. The rest, at the interval's ends, are. Only `key_mask` (padding) is looked at
everywhere.

q, y [B, A, T, D], k, v [B, K, S, D], each with strides of its own and a last one of 1; lse [B, A, T] float32; start,
end [B, T]; key_mask [B, S]. D is DIM, in memory; in registers it is HEAD + TAIL columns, both powers of two (80 = 64 +
16), the last of which may be past DIM: zeros.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels.common import dot, narrow

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

LOWEST = tl.constexpr(-1e38)
"""m before the first key: finite, so that -inf - m is -inf and not NaN, where a row sees nothing."""


@triton.jit
def rows_of(base, row, stride, rows, FIRST: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, CHECK: tl.constexpr):
    """x[row, FIRST : FIRST + COLS], zero past DIM columns and, where CHECK says to look, past `rows` rows."""
    col = FIRST + tl.arange(0, COLS)
    place = base + row[:, None] * stride + col[None, :]
    if CHECK and FIRST + COLS > DIM:
        return tl.load(place, mask=(row < rows)[:, None] & (col < DIM)[None, :], other=0.0)
    elif CHECK:
        return tl.load(place, mask=(row < rows)[:, None], other=0.0)
    elif FIRST + COLS > DIM:
        return tl.load(place, mask=(col < DIM)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def store_rows(base, row, stride, rows, value, FIRST: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr):
    """x[row, FIRST : FIRST + COLS] = value, but for what is past DIM columns or `rows` rows."""
    col = FIRST + tl.arange(0, COLS)
    inside = (row < rows)[:, None]
    if FIRST + COLS > DIM:
        inside = inside & (col < DIM)[None, :]
    tl.store(base + row[:, None] * stride + col[None, :], narrow(value, base.dtype.element_ty), mask=inside)


@triton.jit
def keys_seen(row, queries, keys, start, end, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[low, high) of the keys that each query sees. Rows past the last are taken for the last: they widen nothing."""
    row = tl.minimum(row, queries - 1)
    place = row + (keys - queries)
    low = tl.zeros_like(row)
    high = low + keys
    if CAUSAL:
        high = tl.maximum(tl.minimum(high, place + 1), 0)
    if WINDOW > 0:
        low = tl.maximum(low, place - (WINDOW - 1))
    if start is not None:
        low = tl.maximum(low, tl.load(start + row))
        high = tl.minimum(high, tl.load(end + row))
    return low, high


@triton.jit
def tiles(low, high, BLOCK: tl.constexpr):
    """first <= whole <= ragged <= last: tiles [first, last) are seen by some row, [whole, ragged) entirely by all."""
    first = tl.min(low, axis=0) // BLOCK
    last = tl.maximum(tl.cdiv(tl.max(high, axis=0), BLOCK), first)
    whole = tl.minimum(tl.cdiv(tl.max(low, axis=0), BLOCK), last)
    ragged = tl.maximum(tl.min(high, axis=0) // BLOCK, whole)
    return first, whole, ragged, last


@triton.jit
def squash(x, dtype: tl.constexpr):
    """tanh(x) to an absolute error of 1e-7, which is what matters to exp(cap tanh(x)); for float32, to an ulp."""
    if dtype == tl.float32:
        return common.tanh(x)
    else:
        return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_fwd(
    q,
    k,
    v,
    key_mask,
    start,
    end,
    sinks,
    length,
    y,
    lse,
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
    inner,
    factor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y and lse (None: not wanted) of BLOCK_M queries of one head; program (tile, head, batch).

    factor is scale log2(e), capped: cap log2(e), then inner is scale / cap. `length`, where there is one, is how many
    of the `keys` places of a cache are filled. Causal programs begin with the last tile, which has the most keys.
    """
    tile_m = tl.program_id(0)
    if CAUSAL:
        tile_m = tl.num_programs(0) - 1 - tile_m
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if key_mask is not None:
        key_mask += batch * keys
    if start is not None:
        start += batch * queries
        end += batch * queries
    if length is not None:
        keys = tl.load(length).to(tl.int32)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    low, high = keys_seen(row, queries, keys, start, end, CAUSAL, WINDOW)
    first, whole, ragged, last = tiles(low, high, BLOCK_N)

    q_main = rows_of(q, row, q_token, queries, 0, HEAD, DIM, True)
    acc = tl.zeros([BLOCK_M, HEAD], dtype=tl.float32)
    if TAIL > 0:
        q_tail = rows_of(q, row, q_token, queries, HEAD, TAIL, DIM, True)
        acc_tail = tl.zeros([BLOCK_M, TAIL], dtype=tl.float32)
    m = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sinks is not None:
        m = tl.zeros_like(m) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        total += 1.0

    # The whole tiles first, then those at both ends; written once, traced twice.
    for MASKED in tl.static_range(2):
        begin = first if MASKED else whole
        stop = last - (ragged - whole) if MASKED else ragged
        for index in range(begin, stop):
            tile = tl.where(index < whole, index, index + (ragged - whole)) if MASKED else index
            n = tile * BLOCK_N
            left = keys - n
            k_tile = k + n.to(tl.int64) * k_token
            v_tile = v + n.to(tl.int64) * v_token
            s = dot(q_main, tl.trans(rows_of(k_tile, lane, k_token, left, 0, HEAD, DIM, MASKED)))
            if TAIL > 0:
                s = dot(q_tail, tl.trans(rows_of(k_tile, lane, k_token, left, HEAD, TAIL, DIM, MASKED)), s)
            if CAPPED:
                s = squash(s * inner, q.dtype.element_ty)
            key = n + lane
            if MASKED:
                s = tl.where((key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]), s, -float("inf"))
            if key_mask is not None:
                unpadded = tl.load(key_mask + key, mask=key < keys, other=0) != 0
                s = tl.where(unpadded[None, :], s, -float("inf"))
            peak = tl.maximum(m, tl.max(s, axis=1) * factor)
            p = tl.exp2(s * factor - peak[:, None])
            rescale = tl.exp2(m - peak)
            total = total * rescale + tl.sum(p, axis=1)
            m = peak
            p = narrow(p, v.dtype.element_ty)
            acc = dot(p, rows_of(v_tile, lane, v_token, left, 0, HEAD, DIM, MASKED), acc * rescale[:, None])
            if TAIL > 0:
                v_tail = rows_of(v_tile, lane, v_token, left, HEAD, TAIL, DIM, MASKED)
                acc_tail = dot(p, v_tail, acc_tail * rescale[:, None])

    # A row that sees nothing has a total of 0 and sums of 0.
    inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
    y += batch * y_batch + head * y_head
    store_rows(y, row, y_token, queries, acc * inverse[:, None], 0, HEAD, DIM)
    if TAIL > 0:
        store_rows(y, row, y_token, queries, acc_tail * inverse[:, None], HEAD, TAIL, DIM)
    if lse is not None:
        log = tl.where(total > 0.0, (m + tl.log2(tl.where(total > 0.0, total, 1.0))) * LN_2, float("inf"))
        tl.store(lse + (batch * tl.num_programs(1) + head) * queries + row, log, mask=row < queries)


@triton.jit(do_not_specialize=["seq"])
def document_bounds(segment_ids, start, end, batch_stride, seq, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """start and end of BLOCK tokens; program (block, batch). A token begins a document where the id changes.

    The last beginning at or before the block's first token, and the first one after its last, are looked for SPAN
    tokens at a time; inside the block each token takes the nearest of BLOCK.
    """
    batch = tl.program_id(1).to(tl.int64)
    ids = segment_ids + batch * batch_stride
    first = tl.program_id(0) * BLOCK
    lane = tl.arange(0, SPAN)
    before = tl.zeros([SPAN], dtype=tl.int32)
    for place in range(0, first + 1, SPAN):
        at = place + lane
        inside = (at > 0) & (at <= first)
        begins = tl.load(ids + at, mask=inside, other=0) != tl.load(ids + at - 1, mask=inside, other=0)
        before = tl.maximum(before, tl.where(begins, at, 0))
    after = tl.zeros([SPAN], dtype=tl.int32) + seq
    for place in range(first + BLOCK, seq, SPAN):
        at = place + lane
        inside = at < seq
        begins = tl.load(ids + at, mask=inside, other=0) != tl.load(ids + at - 1, mask=inside, other=0)
        after = tl.minimum(after, tl.where(begins, at, seq))
    token = first + tl.arange(0, BLOCK)
    inside = (token > first) & (token < seq)
    begins = tl.load(ids + token, mask=inside, other=0) != tl.load(ids + token - 1, mask=inside, other=0)
    # other [1, BLOCK] beside token [BLOCK, 1]
    nearest = tl.max(tl.where(begins[None, :] & (token[None, :] <= token[:, None]), token[None, :], 0), axis=1)
    next_one = tl.min(tl.where(begins[None, :] & (token[None, :] > token[:, None]), token[None, :], seq), axis=1)
    out = batch * seq + token
    tl.store(start + out, tl.maximum(nearest, tl.max(before, axis=0)), mask=token < seq)
    tl.store(end + out, tl.minimum(next_one, tl.min(after, axis=0)), mask=token < seq)
