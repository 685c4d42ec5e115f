"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), its masks and the moves of heads around it."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.activation import softcap
from smedjan.ops.elementwise import add, cast, scale
from smedjan.ops.linear import matmul, transpose_last


@op
def split_heads(x: Tensor, *, heads: int) -> Spec:
    """x [B, T, H*D] -> y [B, H, T, D]"""
    batch, seq, width = x.shape
    require(width % heads == 0, f"split_heads: {width} columns in {heads} heads")
    return x.like(shape=(batch, heads, seq, width // heads))


@split_heads.vjp
def _(dys, ins, outs, needs, acc, *, heads):
    return (split_heads_bwd(dys[0]),)


@op
def split_heads_bwd(dy: Tensor) -> Spec:
    """dy [B, H, T, D] -> dx [B, T, H*D]"""
    batch, heads, seq, dim = dy.shape
    return dy.like(shape=(batch, seq, heads * dim))


@op
def merge_heads(x: Tensor) -> Spec:
    """x [B, H, T, D] -> y [B, T, H*D]"""
    batch, heads, seq, dim = x.shape
    return x.like(shape=(batch, seq, heads * dim))


@merge_heads.vjp
def _(dys, ins, outs, needs, acc):
    return (merge_heads_bwd(dys[0], heads=ins[0].shape[1]),)


@op
def merge_heads_bwd(dy: Tensor, *, heads: int) -> Spec:
    """dy [B, T, H*D] -> dx [B, H, T, D]"""
    batch, seq, width = dy.shape
    return dy.like(shape=(batch, heads, seq, width // heads))


@op
def swap_heads(x: Tensor) -> Spec:
    """x [B, T, H, D] -> y [B, H, T, D], and back"""
    batch, one, other, dim = x.shape
    return x.like(shape=(batch, other, one, dim))


@swap_heads.vjp
def _(dys, ins, outs, needs, acc):
    return (swap_heads(dys[0]),)


@op
def repeat_kv(x: Tensor, *, times: int) -> Spec:
    """Each key/value head `times` times in a row.       x [B, K, S, D] -> y [B, K*times, S, D]"""
    batch, heads, seq, dim = x.shape
    return x.like(shape=(batch, heads * times, seq, dim))


@repeat_kv.vjp
def _(dys, ins, outs, needs, acc, *, times):
    return (repeat_kv_bwd(dys[0], times=times),)


@op
def repeat_kv_bwd(dy: Tensor, *, times: int) -> Spec:
    """dx = sum over the copies of a head.       dy [B, K*times, S, D] -> dx [B, K, S, D]"""
    batch, heads, seq, dim = dy.shape
    return dy.like(shape=(batch, heads // times, seq, dim))


@op
def contiguous(x: Tensor) -> Spec:
    """The same values in C order: strides choose the BLAS call, and with it the bits."""
    return x.like()


@contiguous.vjp
def _(dys, ins, outs, needs, acc):
    return (dys[0],)


@op
def padding_mask(attention_mask: Tensor, *, queries: int, window: int = 0) -> Spec:
    """m[b, 0, i, j] = key j is no padding and j <= i + S - T, and j > i + S - T - window where there is one

    attention_mask [B, S] bool -> m [B, 1, T, S] bool; with a window, of the last T + window - 1 keys alone.
    """
    batch, keys = attention_mask.shape
    return Spec((batch, 1, queries, keys), "bool")


@op
def document_mask(segment_ids: Tensor, *, window: int = 0) -> Spec:
    """m[b, 0, i, j] = j <= i, both in one document, and j > i - window where there is one

    segment_ids [B, T] -> m [B, 1, T, T] bool"""
    batch, seq = segment_ids.shape
    return Spec((batch, 1, seq, seq), "bool")


@op
def causal_mask(like: Tensor, *, keys: int, window: int = 0) -> Spec:
    """m[0, 0, i, j] = j <= i, and j > i - window where there is one.       like [B, T] (for T alone) -> m [1, 1, T, T]

    `keys` is the declared width: T, or the capacity of a cache of which the first T places are read. One query alone,
    past a window, sees all the `window` keys that are read for it.
    """
    return Spec((1, 1, like.shape[1], keys), "bool")


@op
def mask_to_bias(mask: Tensor, *, dtype: str) -> Spec:
    """0 where the mask is true, the lowest finite number of `dtype` where it is not"""
    return mask.like(dtype=dtype)


@op
def softmax(x: Tensor) -> Spec:
    """y = exp(x - max) / sum exp(x - max), over the last dim"""
    return x.like()


@softmax.vjp
def _(dys, ins, outs, needs, acc):
    return (softmax_bwd(dys[0], outs.public[0]),)


@op
def softmax_bwd(dy: Tensor, y: Tensor) -> Spec:
    """dx = y (dy - sum(dy y))"""
    return dy.like()


def _attention_flops(node) -> int:
    q, k = node.inputs[0], node.inputs[1]
    return 4 * q.numel * k.shape[2] // (2 if node.attrs["causal"] else 1)


@op(saves=("lse",), cost=_attention_flops)
def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float) -> tuple[Spec, Spec]:
    """y = softmax(scale q k^T + mask) v, softmax in float32.       q [B, H, T, D], k, v [B, K, S, D] -> y [B, H, T, D]

    K divides H (grouped-query). `causal` masks j > i and goes without `mask` (bool, true = attend). Saves
    lse [B, H, T] = log sum exp of the scores, float32.
    """
    require(k.shape == v.shape and q.shape[1] % k.shape[1] == 0, f"sdpa: q {q.shape}, k {k.shape}, v {v.shape}")
    require(not (causal and mask is not None), "sdpa: causal and a mask")
    return q.like(), Spec(q.shape[:3], "float32")


@sdpa.vjp
def _(dys, ins, outs, needs, acc, *, causal, scale):
    q, k, v, mask = ins
    dq, dk, dv = sdpa_bwd(dys[0], q, k, v, mask, outs.public[0], outs.saved[0], causal=causal, scale=scale)
    return dq, dk, dv, None


@op(cost=lambda node: 5 * node.inputs[1].numel * node.inputs[2].shape[2])
def sdpa_bwd(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Spec, Spec, Spec]:
    """dv = p^T dy;  ds = p (dy v^T - rowsum(dy y));  dq = scale ds k;  dk = scale ds^T q

    with p = exp(scale q k^T - lse)"""
    return q.like(), k.like(), v.like()


@op(saves=("lse",), cost=_attention_flops)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
    implementation: str = "sdpa",
    cap: float = 0.0,
    softmax_dtype: str = "float32",
) -> tuple[Spec, Spec]:
    """`sdpa` as one of transformers' two computations: "sdpa" (torch's fused op) or "eager" (two matmuls).

    They differ in rounding alone. "eager" rounds the probabilities to q's dtype before the second matmul; only it caps
    the scores (cap tanh(s / cap), before the mask), or makes the softmax in `softmax_dtype` "" (q's, as GPT-2 does).
    """
    require(implementation in ("sdpa", "eager"), f"attention: implementation {implementation!r}")
    require(implementation == "eager" or not cap, "attention: torch's fused attention has no softcap")
    require(q.shape[1] % k.shape[1] == 0, f"attention: {q.shape[1]} query heads over {k.shape[1]} key heads")
    return q.like(), Spec(q.shape[:3], "float32")


@attention.decompose
def _(q, k, v, mask, *, causal, scale, implementation, cap, softmax_dtype):
    times = q.shape[1] // k.shape[1]
    if implementation == "sdpa":
        if times > 1 and mask is not None and q.shape[2] > 1:
            k, v = repeat_kv(k, times=times), repeat_kv(v, times=times)
        return sdpa(q, k, v, mask, causal=causal, scale=scale)
    if times > 1:
        k, v = repeat_kv(k, times=times), repeat_kv(v, times=times)
    scores = _scaled(matmul(q, transpose_last(k)), scale)
    if cap:
        scores = softcap(scores, cap)
    if mask is not None:
        scores = add(scores, mask_to_bias(mask, dtype=q.dtype))
    weights = cast(softmax(cast(scores, softmax_dtype or q.dtype)), q.dtype)
    return matmul(weights, v)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return scale(x, factor=factor)


@attention.vjp
def _(dys, ins, outs, needs, acc, **attrs):
    q, k, v, mask = ins
    dq, dk, dv = attention_bwd(dys[0], q, k, v, mask, outs.public[0], outs.saved[0], **attrs)
    return dq, dk, dv, None


@op(cost=lambda node: 5 * node.inputs[1].numel * node.inputs[2].shape[2])
def attention_bwd(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    implementation: str,
    cap: float,
    softmax_dtype: str,
) -> tuple[Spec, Spec, Spec]:
    """The gradients of q, k and v, as `sdpa_bwd` has them."""
    return q.like(), k.like(), v.like()


backward_by_decomposition(
    attention_bwd,
    attention,
    lambda dy, q, k, v, mask, y, lse, **attrs: (
        (q, k, v, mask),
        attrs,
        (dy,),
        (True, True, True, False),
        (None,) * 4,
    ),
)
