"""Attention over caches on Triton: rules over `kernels/decode.py` and, for many new tokens, `kernels/attention.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from smedjan.backends.cuda_triton import tuned
from smedjan.backends.cuda_triton.attention import INSIDE, columns, fits, forward, scalings, shape_class
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import decode as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches

FEW = 16
"""New tokens for which the cache is split. More of them, a prompt's, are tiles of queries enough for a GPU."""

PROGRAMS = 264
"""Programs that a decoding step asks for: two for each multiprocessor of an H100, whatever the GPU, so that the order
of the sums is one."""

MAX_SPLITS = 64


def splits(programs: int, keys: int, block: int) -> int:
    """Runs that `keys` places are cut into: a power of two, enough for `PROGRAMS`, each of two tiles at least."""
    count = 1
    while count < MAX_SPLITS and count * programs < PROGRAMS and 4 * count * block <= keys:
        count *= 2
    return count


def _decode(
    run: Launches,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    block_table: Tensor | None,
    length: Tensor,
    sinks: Tensor | None,
    y: Tensor,
    *,
    scale: float,
    window: int,
    cap: float,
) -> None:
    batch, query_heads, queries, dim = q.shape
    key_heads, page = k.shape[1:3]
    group = query_heads // key_heads
    shape = tuned.options("attention_decode", shape_class(q))
    block_m = min(max(common.next_power_of_2(group * queries), 16), 64)
    tiles = common.cdiv(group * queries, block_m)
    keys = page if block_table is None else page * block_table.shape[1]
    count = splits(batch * key_heads * tiles, min(window + queries, keys) if window else keys, shape["BLOCK_N"])
    head, tail = columns(dim)
    sums = statistics = None
    if count > 1:
        sums = run.scratch((batch, query_heads, queries, count, dim), torch.float32)
        statistics = run.scratch((2, batch, query_heads, queries, count), torch.float32)
    strides = [stride for tensor in (q, k, v, y) for stride in tensor.stride()[:3]]
    run.kernel(
        kernels.attention_decode,
        (count, key_heads, batch * tiles),
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
        *strides,
        queries,
        keys,
        0 if block_table is None else block_table.shape[1],
        length.stride(0) if length.ndim else 0,
        *scalings(scale, cap),
        GROUP=group,
        DIM=dim,
        HEAD=head,
        TAIL=tail,
        WINDOW=window,
        CAPPED=bool(cap),
        PAGE=0 if block_table is None else page,
        SPLITS=count,
        BLOCK_M=block_m,
        **shape,
    )
    if count > 1:
        run.kernel(
            kernels.attention_join,
            (batch * query_heads * queries,),
            sums,
            statistics,
            sinks,
            y,
            *y.stride()[:3],
            queries,
            HEADS=query_heads,
            DIM=dim,
            COLS=common.next_power_of_2(dim),
            SPLITS=count,
            num_warps=4,
            enable_fp_fusion=True,
        )


@RULES.kernel("cached_attention", label="triton attention_decode", supports=fits, order={0: INSIDE}, strided=True)
def cached_attention(run: Launches, ins: tuple, outs: tuple, *, scale: float, window: int, cap: float) -> None:
    """q [B, A, T, D], k_cache, v_cache [B, K, S, D], key_mask [B, S], length [], sinks [A] -> y [B, A, T, D]"""
    q, k, v, key_mask, length, sinks = ins
    (y,) = outs
    if q.shape[2] > FEW:
        given = (q, k, v, key_mask, None, None, sinks, length)
        forward(run, given, (y, None), scale=scale, causal=True, window=window, cap=cap)
    else:
        _decode(run, q, k, v, key_mask, None, length, sinks, y, scale=scale, window=window, cap=cap)


@RULES.kernel("paged_attention", label="triton attention_decode", supports=fits, order={0: INSIDE}, strided=True)
def paged_attention(run: Launches, ins: tuple, outs: tuple, *, scale: float, window: int, cap: float) -> None:
    """q [B, A, T, D], k_pages, v_pages [P, K, page, D], block_table [B, N], lengths [B], sinks -> y [B, A, T, D]"""
    q, k, v, block_table, lengths, sinks = ins
    (y,) = outs
    _decode(run, q, k, v, None, block_table, lengths, sinks, y, scale=scale, window=window, cap=cap)
