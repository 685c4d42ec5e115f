"""Attention, backward: the scores once more, tile by tile, from q, k and lse.

    t  = sum(dy y, -1)                                  a row of its own kernel
    p  = exp(s - lse);  dv = p^T dy
    ds = p (dy v^T - t), capped: times 1 - (s / cap)^2
    dk = scale ds^T q;  dq = scale ds k;  dsink = -sum exp(sink - lse) t

Dao, "FlashAttention-2", 2023, algorithm 2, in two passes. A program of the first owns a tile of keys and sums dk and dv
over the queries, of all heads of the key head's group, that see it; one of the second owns a tile of queries and sums
dq over the keys. s and dy v^T are computed in both, seven products where one pass has five: in return each sum lies in
one program's registers, in one order, without atomics and without a float32 dq in memory. The backward is
deterministic, and there is no other. The first pass computes k q^T and v dy^T, scores that are transposed already: p^T
and ds^T are left operands as they come.

Scores, p and ds are float32; p and ds are rounded to the inputs' dtype before they meet dy, q and k. Layouts, intervals
and tiles are the forward's (`kernels/attention.py`).
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.attention import LOG2_E, keys_seen, rows_of, squash, store_rows, tiles
from smedjan.backends.cuda_triton.kernels.common import dot, narrow


@triton.jit
def seen_by(key, queries, keys, start, end, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[low, high) of the queries that see each key: `keys_seen` the other way round.

    Of documents, which are runs, i is in j's where j is in i's. Keys past the last are taken for the last.
    """
    key = tl.minimum(key, keys - 1)
    place = key - (keys - queries)
    low = tl.zeros_like(key)
    high = low + queries
    if CAUSAL:
        low = tl.maximum(low, place)
    if WINDOW > 0:
        high = tl.maximum(tl.minimum(high, place + WINDOW), 0)
    if start is not None:
        low = tl.maximum(low, tl.load(start + key))
        high = tl.minimum(high, tl.load(end + key))
    return low, high


@triton.jit(do_not_specialize=["queries"])
def attention_bwd_rows(
    dy,
    y,
    t,
    dy_batch,
    dy_head,
    dy_token,
    y_batch,
    y_head,
    y_token,
    queries,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """t = sum(dy y, -1) of ROWS queries of one head; program (tile, head, batch)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    dy += batch * dy_batch + head * dy_head
    y += batch * y_batch + head * y_head
    grad = rows_of(dy, row, dy_token, queries, 0, COLS, DIM, True).to(tl.float32)
    value = rows_of(y, row, y_token, queries, 0, COLS, DIM, True).to(tl.float32)
    tl.store(t + (batch * tl.num_programs(1) + head) * queries + row, tl.sum(grad * value, axis=1), mask=row < queries)


@triton.jit(do_not_specialize=["batches", "queries"])
def attention_bwd_sinks(sinks, lse, t, dsinks, batches, queries, BLOCK: tl.constexpr):
    """dsink of one head; program = head. All its rows in one order."""
    head = tl.program_id(0).to(tl.int64)
    sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for batch in range(batches):
        first = (head + batch * tl.num_programs(0)) * queries
        for place in range(0, queries, BLOCK):
            row = place + tl.arange(0, BLOCK)
            share = tl.exp2(sink - tl.load(lse + first + row, mask=row < queries, other=float("inf")) * LOG2_E)
            total += share * tl.load(t + first + row, mask=row < queries, other=0.0)
    tl.store(dsinks + head, narrow(-tl.sum(total, axis=0), dsinks.dtype.element_ty))


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_bwd_kv(
    q,
    k,
    v,
    dy,
    key_mask,
    start,
    end,
    lse,
    t,
    dk,
    dv,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    dy_batch,
    dy_head,
    dy_token,
    dk_batch,
    dk_head,
    dk_token,
    dv_batch,
    dv_head,
    dv_token,
    queries,
    keys,
    scale,
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
    """dk and dv (None: not wanted) of BLOCK_N keys of one key head; program (tile, key head, batch).

    Scores are [keys, queries] here.
    """
    n = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if start is not None:
        start += batch * queries
        end += batch * queries
    q += batch * q_batch + kv_head * GROUP * q_head
    dy += batch * dy_batch + kv_head * GROUP * dy_head
    statistics = (batch * tl.num_programs(1) + kv_head) * GROUP * queries
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head

    key = n + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_M)
    low, high = seen_by(key, queries, keys, start, end, CAUSAL, WINDOW)
    first, whole, ragged, last = tiles(low, high, BLOCK_M)
    if key_mask is not None:
        unpadded = tl.load(key_mask + batch * keys + key, mask=key < keys, other=0) != 0

    k_main = rows_of(k, key, k_token, keys, 0, HEAD, DIM, True)
    v_main = rows_of(v, key, v_token, keys, 0, HEAD, DIM, True)
    dk_main = tl.zeros([BLOCK_N, HEAD], dtype=tl.float32)
    dv_main = tl.zeros([BLOCK_N, HEAD], dtype=tl.float32)
    if TAIL > 0:
        k_tail = rows_of(k, key, k_token, keys, HEAD, TAIL, DIM, True)
        v_tail = rows_of(v, key, v_token, keys, HEAD, TAIL, DIM, True)
        dk_tail = tl.zeros([BLOCK_N, TAIL], dtype=tl.float32)
        dv_tail = tl.zeros([BLOCK_N, TAIL], dtype=tl.float32)

    for MASKED in tl.static_range(2):
        begin = first if MASKED else whole
        count = (last - first) - (ragged - whole) if MASKED else ragged - whole
        # One loop over heads and tiles, so that a short one does not drain its loads at each head.
        for step in range(0, GROUP * count):
            member = step // count
            index = begin + step % count
            tile = tl.where(index < whole, index, index + (ragged - whole)) if MASKED else index
            left = queries - tile * BLOCK_M
            m = (tile * BLOCK_M).to(tl.int64)
            q_tile = q + member * q_head + m * q_token
            dy_tile = dy + member * dy_head + m * dy_token
            rows = statistics + member * queries + m + lane
            if MASKED:
                z = tl.load(lse + rows, mask=lane < left, other=float("inf"))
            else:
                z = tl.load(lse + rows)
            q_main = rows_of(q_tile, lane, q_token, left, 0, HEAD, DIM, MASKED)
            dy_main = rows_of(dy_tile, lane, dy_token, left, 0, HEAD, DIM, MASKED)
            s = dot(k_main, tl.trans(q_main))
            if TAIL > 0:
                q_tail = rows_of(q_tile, lane, q_token, left, HEAD, TAIL, DIM, MASKED)
                dy_tail = rows_of(dy_tile, lane, dy_token, left, HEAD, TAIL, DIM, MASKED)
                s = dot(k_tail, tl.trans(q_tail), s)
            if CAPPED:
                s = squash(s * inner, q.dtype.element_ty)
            p = tl.exp2(s * factor - (z * LOG2_E)[None, :])
            if MASKED:
                row = tile * BLOCK_M + lane
                p = tl.where((row[None, :] >= low[:, None]) & (row[None, :] < high[:, None]), p, 0.0)
            if key_mask is not None:
                p = tl.where(unpadded[:, None], p, 0.0)
            if dv is not None:
                rounded = narrow(p, dy.dtype.element_ty)
                dv_main = dot(rounded, dy_main, dv_main)
                if TAIL > 0:
                    dv_tail = dot(rounded, dy_tail, dv_tail)
            if dk is not None:
                dp = dot(v_main, tl.trans(dy_main))
                if TAIL > 0:
                    dp = dot(v_tail, tl.trans(dy_tail), dp)
                # Only now: a row of t and lse takes a thread 16 registers each.
                if MASKED:
                    inner_sum = tl.load(t + rows, mask=lane < left, other=0.0)
                else:
                    inner_sum = tl.load(t + rows)
                ds = p * (dp - inner_sum[None, :])
                if CAPPED:
                    ds = ds * (1.0 - s * s)
                ds = narrow(ds, q.dtype.element_ty)
                dk_main = dot(ds, q_main, dk_main)
                if TAIL > 0:
                    dk_tail = dot(ds, q_tail, dk_tail)

    if dk is not None:
        dk += batch * dk_batch + kv_head * dk_head
        store_rows(dk, key, dk_token, keys, dk_main * scale, 0, HEAD, DIM)
        if TAIL > 0:
            store_rows(dk, key, dk_token, keys, dk_tail * scale, HEAD, TAIL, DIM)
    if dv is not None:
        dv += batch * dv_batch + kv_head * dv_head
        store_rows(dv, key, dv_token, keys, dv_main, 0, HEAD, DIM)
        if TAIL > 0:
            store_rows(dv, key, dv_token, keys, dv_tail, HEAD, TAIL, DIM)


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_bwd_q(
    q,
    k,
    v,
    dy,
    key_mask,
    start,
    end,
    lse,
    t,
    dq,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    dy_batch,
    dy_head,
    dy_token,
    dq_batch,
    dq_head,
    dq_token,
    queries,
    keys,
    scale,
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
    """dq of BLOCK_M queries of one head; program (tile, head, batch), causal ones from the last tile on."""
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
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head
    dy += batch * dy_batch + head * dy_head

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    low, high = keys_seen(row, queries, keys, start, end, CAUSAL, WINDOW)
    first, whole, ragged, last = tiles(low, high, BLOCK_N)

    statistics = (batch * tl.num_programs(1) + head) * queries + row
    z = tl.load(lse + statistics, mask=row < queries, other=float("inf")) * LOG2_E
    inner_sum = tl.load(t + statistics, mask=row < queries, other=0.0)
    q_main = rows_of(q, row, q_token, queries, 0, HEAD, DIM, True)
    dy_main = rows_of(dy, row, dy_token, queries, 0, HEAD, DIM, True)
    dq_main = tl.zeros([BLOCK_M, HEAD], dtype=tl.float32)
    if TAIL > 0:
        q_tail = rows_of(q, row, q_token, queries, HEAD, TAIL, DIM, True)
        dy_tail = rows_of(dy, row, dy_token, queries, HEAD, TAIL, DIM, True)
        dq_tail = tl.zeros([BLOCK_M, TAIL], dtype=tl.float32)

    for MASKED in tl.static_range(2):
        begin = first if MASKED else whole
        stop = last - (ragged - whole) if MASKED else ragged
        for index in range(begin, stop):
            tile = tl.where(index < whole, index, index + (ragged - whole)) if MASKED else index
            n = tile * BLOCK_N
            left = keys - n
            k_tile = k + n.to(tl.int64) * k_token
            v_tile = v + n.to(tl.int64) * v_token
            k_main = rows_of(k_tile, lane, k_token, left, 0, HEAD, DIM, MASKED)
            s = dot(q_main, tl.trans(k_main))
            dp = dot(dy_main, tl.trans(rows_of(v_tile, lane, v_token, left, 0, HEAD, DIM, MASKED)))
            if TAIL > 0:
                k_tail = rows_of(k_tile, lane, k_token, left, HEAD, TAIL, DIM, MASKED)
                s = dot(q_tail, tl.trans(k_tail), s)
                dp = dot(dy_tail, tl.trans(rows_of(v_tile, lane, v_token, left, HEAD, TAIL, DIM, MASKED)), dp)
            if CAPPED:
                s = squash(s * inner, q.dtype.element_ty)
            p = tl.exp2(s * factor - z[:, None])
            key = n + lane
            if MASKED:
                p = tl.where((key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]), p, 0.0)
            if key_mask is not None:
                unpadded = tl.load(key_mask + key, mask=key < keys, other=0) != 0
                p = tl.where(unpadded[None, :], p, 0.0)
            ds = p * (dp - inner_sum[:, None])
            if CAPPED:
                ds = ds * (1.0 - s * s)
            ds = narrow(ds, q.dtype.element_ty)
            dq_main = dot(ds, k_main, dq_main)
            if TAIL > 0:
                dq_tail = dot(ds, k_tail, dq_tail)

    dq += batch * dq_batch + head * dq_head
    store_rows(dq, row, dq_token, queries, dq_main * scale, 0, HEAD, DIM)
    if TAIL > 0:
        store_rows(dq, row, dq_token, queries, dq_tail * scale, HEAD, TAIL, DIM)
