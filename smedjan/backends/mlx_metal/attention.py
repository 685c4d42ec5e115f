"""Attention: `mx.fast.scaled_dot_product_attention` forward, query tiles backward. MLX gives no lse: it is recomputed.

B batch, A query heads, K key/value heads, G = A / K, T queries, S keys, D head_dim.
"""

from __future__ import annotations

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import DTYPES, wide
from smedjan.backends.mlx_metal.table import RULES
from smedjan.graph.node import Node

TILE_SCORES = 1 << 26
"""Scores of one query tile alive at once: 256 MiB in float32."""
FUSED_HEAD_DIMS = (64, 80, 128)
"""Head dims of MLX's fused Metal kernels; others, and the CPU, run MLX's composed fallback."""


@RULES.rule("split_heads")
def split_heads(x: mx.array, *, heads: int) -> mx.array:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


@RULES.rule("split_heads_bwd")
def split_heads_bwd(dy: mx.array) -> mx.array:
    return merge_heads(dy)


@RULES.rule("merge_heads")
def merge_heads(x: mx.array) -> mx.array:
    batch, heads, seq, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, seq, heads * dim)


@RULES.rule("merge_heads_bwd")
def merge_heads_bwd(dy: mx.array, *, heads: int) -> mx.array:
    return split_heads(dy, heads=heads)


@RULES.rule("swap_heads")
def swap_heads(x: mx.array) -> mx.array:
    return x.swapaxes(1, 2)


@RULES.rule("repeat_kv")
def repeat_kv(x: mx.array, *, times: int) -> mx.array:
    return mx.repeat(x, times, axis=1)


@RULES.rule("repeat_kv_bwd")
def repeat_kv_bwd(dy: mx.array, *, times: int) -> mx.array:
    batch, heads, seq, dim = dy.shape
    return wide(dy).reshape(batch, heads // times, times, seq, dim).sum(axis=2).astype(dy.dtype)


@RULES.rule("contiguous", temporaries=lambda node: 0)  # MLX exports no such primitive: it is not traced
def contiguous(x: mx.array) -> mx.array:
    return mx.contiguous(x)


def _lower_triangle(queries: int, keys: int, window: int = 0) -> mx.array:
    """[T, S]: key j <= i + S - T, and the nearest `window` of them where there is one"""
    place, key = mx.arange(queries)[:, None] + (keys - queries), mx.arange(keys)[None]
    seen = key <= place
    return mx.logical_and(seen, key > place - window) if window else seen


@RULES.rule("causal_mask")
def causal_mask(like: mx.array, *, keys: int, window: int) -> mx.array:
    seq = like.shape[1]
    return _lower_triangle(seq, window if window and seq == 1 else seq, window)[None, None]


@RULES.rule("padding_mask")
def padding_mask(attention_mask: mx.array, *, queries: int, window: int) -> mx.array:
    if window:
        attention_mask = attention_mask[:, max(0, attention_mask.shape[1] - queries - window + 1) :]
    causal = _lower_triangle(queries, attention_mask.shape[1], window)
    return mx.logical_and(causal[None, None], attention_mask.astype(mx.bool_)[:, None, None, :])


@RULES.rule("document_mask")
def document_mask(segment_ids: mx.array, *, window: int) -> mx.array:
    seq = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return mx.logical_and(_lower_triangle(seq, seq, window)[None], same)[:, None]


@RULES.rule("mask_to_bias")
def mask_to_bias(mask: mx.array, *, dtype: str) -> mx.array:
    kind = DTYPES[dtype]
    return mx.where(mask, mx.zeros((), kind), mx.array(mx.finfo(kind).min, kind))


@RULES.rule("softmax")
def softmax(x: mx.array) -> mx.array:
    return mx.softmax(x, axis=-1, precise=True)


@RULES.rule("softmax_bwd")
def softmax_bwd(dy: mx.array, y: mx.array) -> mx.array:
    cotangent, probs = wide(dy), wide(y)
    return (probs * (cotangent - (cotangent * probs).sum(axis=-1, keepdims=True))).astype(dy.dtype)


def _tiles(q: mx.array, k: mx.array) -> list[tuple[int, int]]:
    """Ranges of queries whose scores fit TILE_SCORES."""
    seq = q.shape[2]
    step = max(1, min(seq, TILE_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2])))
    return [(start, min(start + step, seq)) for start in range(0, seq, step)]


def _mask_tile(mask: mx.array | None, start: int, stop: int) -> mx.array | None:
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:stop]


@RULES.rule("sdpa", label="mx.fast.scaled_dot_product_attention, lse recomputed")
def sdpa(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None, *, causal: bool, scale: float
) -> tuple[mx.array, None]:
    assert not causal or q.shape[2] == k.shape[2], "causal attention over a cache that is not empty"
    if mx.metal.is_available() and q.shape[-1] in FUSED_HEAD_DIMS:
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if causal else mask)
    else:
        # The fallback rounds its scores to the inputs' dtype and holds all of them.
        parts: list[mx.array] = []
        keys, values = wide(k), wide(v)
        for start, stop in _tiles(q, k):
            end = stop if causal else k.shape[2]
            tile = wide(q[:, :, start:stop])
            if parts:
                tile = mx.depends([tile], [parts[-1]])[0]
            parts.append(
                mx.fast.scaled_dot_product_attention(
                    tile,
                    keys[:, :, :end],
                    values[:, :, :end],
                    scale=scale,
                    mask="causal" if causal else _mask_tile(mask, start, stop),
                ).astype(q.dtype)
            )
        y = mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]
    if mask is not None:
        # A query that may attend nothing gives zero, as torch has it.
        y = mx.where(mask.any(axis=-1, keepdims=True), y, mx.zeros((), y.dtype))
    return y, None


@RULES.rule("sdpa_bwd", label="mlx, query tiles, softmax recomputed")
def sdpa_bwd(
    dy: mx.array,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    mask: mx.array | None,
    y: mx.array,
    lse: None,
    *,
    causal: bool,
    scale: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """float32 throughout. The G query heads of a group are rows of one product, which sums dk and dv over them."""
    batch, heads, _, dim = q.shape
    groups, keys_seen = k.shape[1], k.shape[2]
    times = heads // groups
    keys, values = wide(k), wide(v)
    dk, dv = mx.zeros(k.shape), mx.zeros(v.shape)
    dq_parts: list[mx.array] = []
    for start, stop in _tiles(q, k):
        end, queries = stop if causal else keys_seen, stop - start

        def grouped(x: mx.array, start: int = start, stop: int = stop) -> mx.array:
            return wide(x[:, :, start:stop]).reshape(batch, groups, times * (stop - start), x.shape[-1])

        tile_q, tile_dy, tile_y = grouped(q), grouped(dy), grouped(y)
        if dq_parts:
            # Without an order, the scheduler may keep the scores of several tiles alive.
            tile_q, tile_dy = mx.depends([tile_q, tile_dy], [dk, dv])
        tile_k, tile_v = keys[:, :, :end], values[:, :, :end]
        scores = (scale * (tile_q @ tile_k.swapaxes(-1, -2))).reshape(batch, groups, times, queries, end)
        seen = _lower_triangle(queries, end) if causal else _mask_tile(mask, start, stop)
        if seen is not None and seen.ndim == 4:
            seen = seen[:, :, None]
        if seen is not None:
            scores = mx.where(seen, scores, mx.finfo(mx.float32).min)
        probs = mx.softmax(scores, axis=-1)
        if seen is not None:
            probs = mx.where(seen, probs, 0.0)
        probs = probs.reshape(batch, groups, times * queries, end)
        delta = (tile_dy * tile_y).sum(axis=-1, keepdims=True)
        dscores = scale * probs * (tile_dy @ tile_v.swapaxes(-1, -2) - delta)
        dq_parts.append((dscores @ tile_k).reshape(batch, heads, queries, dim).astype(q.dtype))
        dk[:, :, :end] += dscores.swapaxes(-1, -2) @ tile_q
        dv[:, :, :end] += probs.swapaxes(-1, -2) @ tile_dy
    dq = mx.concatenate(dq_parts, axis=2) if len(dq_parts) > 1 else dq_parts[0]
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _uncapped(node: Node) -> bool:
    """MLX's fused attention caps no scores: with a softcap, attention runs decomposed."""
    return not node.attrs["cap"]


@RULES.rule("attention", label="mx.fast.scaled_dot_product_attention, lse recomputed", supports=_uncapped)
def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    mask: mx.array | None,
    *,
    causal: bool,
    scale: float,
    implementation: str,
    cap: float,
    softmax_dtype: str,
) -> tuple[mx.array, None]:
    """`implementation` and `softmax_dtype` name roundings of transformers, which only an exact backend reproduces."""
    return sdpa(q, k, v, mask, causal=causal, scale=scale)


@RULES.rule("attention_bwd", label="mlx, query tiles, softmax recomputed", supports=_uncapped)
def attention_bwd(
    dy: mx.array,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    mask: mx.array | None,
    y: mx.array,
    lse: None,
    *,
    causal: bool,
    scale: float,
    implementation: str,
    cap: float,
    softmax_dtype: str,
) -> tuple[mx.array, mx.array, mx.array]:
    return sdpa_bwd(dy, q, k, v, mask, y, lse, causal=causal, scale=scale)
