"""Attention that never holds the scores: forward, backward, over packed documents, and over caches while decoding.

B batch, A query heads, K key/value heads (K divides A: grouped-query), T queries, S keys, D head_dim. Query i stands at
place p = S - T + i. It sees key j where all that is given holds:

    causal       j <= p
    window w     j > p - w
    key_mask     key_mask[b, j]
    start, end   start[b, i] <= j < end[b, i]: i's document

A query that sees nothing gives 0, and no gradient. Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023.
Backends keep the rules of these ops in their `attention.py`: they are `ops/attention.py`'s, as single ops.
"""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.activation import softcap
from smedjan.ops.attention import repeat_kv
from smedjan.ops.elementwise import cast, scale
from smedjan.ops.linear import matmul, transpose_last


@op
def document_bounds(segment_ids: Tensor) -> tuple[Spec, Spec]:
    """start, end: the first token of each token's document, and one past its last

    A document is a run of equal ids.       segment_ids [B, T] -> start, end [B, T] int32
    """
    require(segment_ids.ndim == 2, f"document_bounds: segment_ids {segment_ids.shape}")
    return segment_ids.like(dtype="int32"), segment_ids.like(dtype="int32")


@op
def attention_mask(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    length: Tensor | None,
    *,
    causal: bool,
    window: int,
) -> Spec:
    """m[b, 0, i, j] = query i sees key j       q [B, A, T, D], k [B, K, S, D] (for T and S alone)
    -> m [B, 1, T, S] bool

    Of a cache of S places, `length` ([] or [B]) are filled: p = length - T + i.
    """
    return Spec((q.shape[0], 1, q.shape[2], k.shape[2]), "bool")


@op(saves=("rest",), cost=lambda node: 5 * node.inputs[0].numel)
def masked_softmax(x: Tensor, mask: Tensor, sinks: Tensor | None) -> tuple[Spec, Spec]:
    """y = m exp(x) / (exp(sink) + sum m exp(x)), over the last dim, 0 where that is 0 / 0

    x [B, A, T, S] float32, mask [B, 1, T, S] bool, sinks [A] (an extra logit a head, which has no value; gpt-oss)
    -> y [B, A, T, S]. Saves rest [B, A, T] float32: the sink's share, exp(sink) / (exp(sink) + sum m exp(x)).
    """
    require(x.dtype == "float32", f"masked_softmax of {x.dtype}")
    return x.like(), x.like(shape=x.shape[:-1])


@masked_softmax.vjp
def _(dys, ins, outs, needs, acc):
    _, _, sinks = ins
    made = masked_softmax_bwd(dys[0], outs.public[0], outs.saved[0], sinks if needs[2] else None)
    dx, dsinks = made if needs[2] else (made, None)
    return dx, None, dsinks


@op
def masked_softmax_bwd(dy: Tensor, y: Tensor, rest: Tensor, sinks: Tensor | None) -> tuple[Spec, ...]:
    """dx = y (dy - t),  dsinks = -sum over rows of rest t,  with t = sum(dy y). Without sinks, dx alone."""
    return (dy.like(),) if sinks is None else (dy.like(), sinks.like())


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, factor: float, cap: float, dtype: str
) -> Tensor:
    """softmax(cap tanh(factor q k^T / cap)) v in single ops, the softmax in float32, its result rounded to `dtype`."""
    times = q.shape[1] // k.shape[1]
    if times > 1:
        k, v = repeat_kv(k, times=times), repeat_kv(v, times=times)
    scores = cast(scale(matmul(q, transpose_last(k)), factor=factor), "float32")
    weights = masked_softmax(softcap(scores, cap) if cap else scores, mask, sinks)
    return matmul(cast(weights, dtype), v)


def _check(name: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, factor: float, window: int) -> None:
    require(k.shape == v.shape, f"{name}: k {k.shape}, v {v.shape}")
    require(q.shape[1] % k.shape[1] == 0, f"{name}: {q.shape[1]} query heads over {k.shape[1]} key heads")
    require(q.shape[3] == k.shape[3], f"{name}: head dims {q.shape[3]} and {k.shape[3]}")
    require(sinks is None or sinks.shape == (q.shape[1],), f"{name}: sinks for {q.shape[1]} heads")
    require(factor > 0, f"{name}: scale {factor}")
    require(window >= 0, f"{name}: window {window}")


def _scores(node, *, q: int = 0) -> int:
    """Scores that are no mask's, of all heads: what a causal mask and a window leave. Documents are data."""
    batch, heads, queries, _ = node.inputs[q].shape
    keys, window = node.inputs[q + 1].shape[2], node.attrs["window"]
    seen = keys - (queries - 1) / 2 if node.attrs["causal"] else keys
    return int(batch * heads * queries * max(min(seen, window or seen), 0))


@op(saves=("lse",), cost=lambda node: 4 * _scores(node) * node.inputs[0].shape[3])
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    cap: float = 0.0,
) -> tuple[Spec, Spec]:
    """y = softmax(s) v over what each query sees (above),  s = scale q k^T, capped: cap tanh(s / cap)

    q [B, A, T, D], k, v [B, K, S, D], key_mask [B, S] bool, start, end [B, T] int32 (T = S, `document_bounds`),
    sinks [A]: one more term exp(sink) in the softmax's sum. -> y [B, A, T, D]. Scores and softmax are float32.
    Saves lse [B, A, T] float32 = log of that sum, +inf where a query sees nothing, so that exp(s - lse) is 0.
    """
    _check("flash_attention", q, k, v, sinks, scale, window)
    require(causal or not window, "flash_attention: a window of an attention that is not causal")
    require((start is None) == (end is None), "flash_attention: start without end")
    require(start is None or q.shape[2] == k.shape[2], f"flash_attention: documents of {q.shape[2]} and {k.shape[2]}")
    require(key_mask is None or key_mask.dtype == "bool", "flash_attention: key_mask is bool")
    return q.like(), Spec(q.shape[:3], "float32")


@flash_attention.decompose
def _(q, k, v, key_mask, start, end, sinks, *, scale, causal, window, cap):
    mask = attention_mask(q, k, key_mask, start, end, causal=causal, window=window)
    return _attend(q, k, v, mask, sinks, scale, cap, q.dtype)


@flash_attention.vjp
def _(dys, ins, outs, needs, acc, **attrs):
    made = flash_attention_bwd(dys[0], *ins, outs.public[0], outs.saved[0], needs_sinks=needs[6], **attrs)
    dq, dk, dv, *dsinks = made
    return dq, dk, dv, None, None, None, dsinks[0] if needs[6] else None


@op(cost=lambda node: 10 * _scores(node, q=1) * node.inputs[1].shape[3])
def flash_attention_bwd(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    sinks: Tensor | None,
    y: Tensor,
    lse: Tensor,
    *,
    needs_sinks: bool = False,
    scale: float,
    causal: bool = True,
    window: int = 0,
    cap: float = 0.0,
) -> tuple[Spec, ...]:
    """dv = p^T dy;  ds = p (dy v^T - t) s';  dq = scale ds k;  dk = scale ds^T q;  dsinks = -sum exp(sink - lse) t

    with p = exp(s - lse), t = sum(dy y, -1), and s' = 1, capped: 1 - (s / cap)^2. dk and dv are sums over a group's
    query heads. Gives dq, dk, dv, and dsinks where it is needed.
    """
    return (q.like(), k.like(), v.like(), *((sinks.like(),) if needs_sinks and sinks is not None else ()))


backward_by_decomposition(
    flash_attention_bwd,
    flash_attention,
    lambda dy, q, k, v, key_mask, start, end, sinks, y, lse, *, needs_sinks, **attrs: (
        (q, k, v, key_mask, start, end, sinks),
        attrs,
        (dy,),
        (True, True, True, False, False, False, needs_sinks),
        (None,) * 7,
    ),
)


@op(cost=lambda node: 4 * node.inputs[0].numel * node.inputs[1].shape[2])
def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_mask: Tensor | None,
    length: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Spec:
    """Causal `flash_attention` of the newest T tokens over a cache of S places, of which `length` are filled

    q [B, A, T, D], k_cache, v_cache [B, K, S, D], key_mask [B, S] bool, length [] int64, on the device, the T new ones
    counted: query i stands at place length - T + i. -> y [B, A, T, D]. No gradient.
    """
    _check("cached_attention", q, k_cache, v_cache, sinks, scale, window)
    require(length.shape == (), f"cached_attention: length {length.shape}")
    return q.like()


@cached_attention.decompose
def _(q, k_cache, v_cache, key_mask, length, sinks, *, scale, window, cap):
    mask = attention_mask(q, k_cache, key_mask, None, None, length, causal=True, window=window)
    return _attend(q, k_cache, v_cache, mask, sinks, scale, cap, q.dtype)


@op
def gather_pages(pages: Tensor, block_table: Tensor) -> Spec:
    """y[b, :, n * page + i] = pages[block_table[b, n], :, i]       pages [P, K, page, D], block_table [B, N] int32
    -> y [B, K, N * page, D]"""
    _, heads, page, dim = pages.shape
    return pages.like(shape=(block_table.shape[0], heads, block_table.shape[1] * page, dim))


@op(cost=lambda node: 4 * node.inputs[0].numel * node.inputs[1].shape[2] * node.inputs[3].shape[1])
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Spec:
    """`cached_attention` over a cache in pages (Kwon et al., "PagedAttention", 2023), each sequence of its own length

    q [B, A, T, D], k_pages, v_pages [P, K, page, D], block_table [B, N] int32: the pages of a sequence, in order,
    lengths [B] int32. -> y [B, A, T, D]. Pages past a sequence's length are not read: their numbers may be anything
    from 0 to P - 1.
    """
    _check("paged_attention", q, k_pages, v_pages, sinks, scale, window)
    require(block_table.shape[0] == q.shape[0] == lengths.shape[0], f"paged_attention: {block_table}, {lengths}")
    return q.like()


@paged_attention.decompose
def _(q, k_pages, v_pages, block_table, lengths, sinks, *, scale, window, cap):
    k, v = gather_pages(k_pages, block_table), gather_pages(v_pages, block_table)
    mask = attention_mask(q, k, None, None, None, lengths, causal=True, window=window)
    return _attend(q, k, v, mask, sinks, scale, cap, q.dtype)
