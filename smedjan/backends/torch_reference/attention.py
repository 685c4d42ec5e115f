"""Attention as transformers asks torch for it, with its backward called by name."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.backends.torch_reference.table import RULES
from smedjan.graph.tensor import ITEMSIZE

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@RULES.rule("split_heads")
def split_heads(x, *, heads):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


@RULES.rule("split_heads_bwd")
def split_heads_bwd(dy):
    return dy.transpose(1, 2).reshape(dy.shape[0], dy.shape[2], -1)


@RULES.rule("merge_heads")
def merge_heads(x):
    return x.transpose(1, 2).contiguous().reshape(x.shape[0], x.shape[2], -1)


@RULES.rule("merge_heads_bwd")
def merge_heads_bwd(dy, *, heads):
    return dy.reshape(*dy.shape[:2], heads, -1).transpose(1, 2)


@RULES.rule("swap_heads")
def swap_heads(x):
    return x.transpose(1, 2)


@RULES.rule("repeat_kv")
def repeat_kv(x, *, times):
    batch, heads, seq, dim = x.shape
    return x[:, :, None].expand(batch, heads, times, seq, dim).reshape(batch, heads * times, seq, dim)


@RULES.rule("repeat_kv_bwd")
def repeat_kv_bwd(dy, *, times):
    batch, heads, seq, dim = dy.shape
    return dy.reshape(batch, heads // times, times, seq, dim).sum(2, keepdim=True).squeeze(2)


@RULES.rule("contiguous")
def contiguous(x):
    return x.contiguous()


def _visible(queries, keys, window, device):
    """[T, S]: key j is not behind query i, which stands at place S - T + i, nor `window` or more before it."""
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return visible.triu(keys - queries - window + 1) if window else visible


@RULES.rule("causal_mask")
def causal_mask(like, *, keys, window):
    seq = like.shape[1]
    return _visible(seq, window if window and seq == 1 else seq, window, like.device)[None, None]


@RULES.rule("padding_mask")
def padding_mask(attention_mask, *, queries, window):
    batch, keys = attention_mask.shape
    if window:
        keys = min(keys, queries + window - 1)
        attention_mask = attention_mask[:, -keys:]
    causal = _visible(queries, keys, window, attention_mask.device)
    return (causal & attention_mask.to(torch.bool)[:, None, None, :]).expand(batch, 1, queries, keys)


@RULES.rule("document_mask")
def document_mask(segment_ids, *, window):
    seq = segment_ids.shape[1]
    causal = _visible(seq, seq, window, segment_ids.device)
    return (causal & (segment_ids[:, :, None] == segment_ids[:, None, :]))[:, None]


@RULES.rule("mask_to_bias")
def mask_to_bias(mask, *, dtype):
    torch_dtype = DTYPES[dtype]
    zero = torch.zeros((), dtype=torch_dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(torch_dtype).min)


@RULES.rule("softmax")
def softmax(x):
    return torch.softmax(x, -1)


@RULES.rule("softmax_bwd")
def softmax_bwd(dy, y):
    return torch.ops.aten._softmax_backward_data(dy, y, -1, y.dtype)


def _float_mask(mask, dtype):
    """sdpa turns a boolean mask into 0 and -inf of the query's dtype before its kernel."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _blocks(node, place):
    """Bytes of the mask, the input at `place`, as `_float_mask` makes it, of its complement, and of a block of queries
    by keys in float32, one for each thread (ATen/native/cpu/FlashAttentionKernel.cpp)."""
    like, mask = node.inputs[0], node.inputs[place]
    seq = like.shape[2]
    queries = 256 if seq >= 768 else 64 if seq >= 192 else 32
    block = 4 * queries * min(512, seq) * torch.get_num_threads()
    if mask is None or mask.dtype != "bool":
        return 0, 0, block
    return mask.numel * ITEMSIZE[like.dtype], mask.numel, block


def forward_bytes(node):
    """What `sdpa` takes besides its results: of narrow dtypes, a block more in float32, and keys and values packed."""
    q, k, v = node.inputs[:3]
    mask, complement, block = _blocks(node, 3)
    sums = 2 * block if q.dtype == "float32" else 3 * block + k.nbytes + v.nbytes
    return mask + max(complement, sums)


def backward_bytes(node):
    """What `sdpa_bwd` takes besides its results: a copy of dy, and two blocks; of narrow dtypes two more."""
    dy = node.inputs[0]
    mask, complement, block = _blocks(node, 4)
    return mask + max(complement, dy.nbytes + (2 if dy.dtype == "float32" else 4) * block)


@RULES.rule(
    "sdpa",
    label="aten flash attention (CPU)",
    supports=lambda node: node.inputs[0].shape[2] > 1,
    temporaries=forward_bytes,
)
def sdpa(q, k, v, mask, *, causal, scale):
    return FORWARD(q, k, v, 0.0, causal, attn_mask=_float_mask(mask, q.dtype), scale=scale)


@RULES.rule("sdpa_bwd", label="aten flash attention (CPU)", temporaries=backward_bytes)
def sdpa_bwd(dy, q, k, v, mask, y, lse, *, causal, scale):
    return BACKWARD(dy, q, k, v, y, lse, 0.0, causal, attn_mask=_float_mask(mask, q.dtype), scale=scale)


@RULES.rule(
    "sdpa", label="torch.nn.functional.scaled_dot_product_attention", supports=lambda n: n.inputs[0].shape[2] == 1
)
def sdpa_decode(q, k, v, mask, *, causal, scale):
    """One query: transformers packs the query heads of a group into rows where a mask is given. No lse: no gradient."""
    times = q.shape[1] // k.shape[1]
    if times > 1 and mask is not None:
        batch, heads, _, dim = q.shape
        packed = q.reshape(batch, heads // times, times, dim)
        y = torch.nn.functional.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
        return y.reshape(batch, heads, 1, dim), None
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, is_causal=False, enable_gqa=times > 1
    )
    return y, None


@RULES.rule("document_bounds")
def document_bounds(segment_ids):
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    differs = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins, ends = torch.zeros_like(places), torch.full_like(places, segment_ids.shape[1])
    begins[:, 1:] = places[:, 1:].where(differs, 0)
    ends[:, :-1] = places[:, 1:].where(differs, segment_ids.shape[1])
    end = ends.flip(1).cummin(1).values.flip(1) if segment_ids.numel() else ends
    start = begins.cummax(1).values if segment_ids.numel() else begins
    return start.to(torch.int32), end.to(torch.int32)


@RULES.rule("attention_mask")
def attention_mask(q, k, key_mask, start, end, length, *, causal, window):
    (batch, _, queries, _), keys = q.shape, k.shape[2]
    filled = torch.as_tensor(keys if length is None else length, device=q.device).reshape(-1, 1, 1)
    place = filled - queries + torch.arange(queries, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)
    seen = (key < filled).expand(batch, queries, keys)
    if causal:
        seen = seen & (key <= place)
    if window:
        seen = seen & (key > place - window)
    if key_mask is not None:
        # Over a cache it is as long as what is filled.
        seen = seen & torch.nn.functional.pad(key_mask, (0, keys - key_mask.shape[1]))[:, None]
    if start is not None:
        seen = seen & (key >= start[..., None]) & (key < end[..., None])
    return seen[:, None]


@RULES.rule("masked_softmax")
def masked_softmax(x, mask, sinks):
    scores = x.masked_fill(mask.logical_not(), float("-inf"))
    sink = x.new_full((1,), float("-inf")) if sinks is None else sinks.to(x.dtype)
    sink = sink[:, None, None].expand(*x.shape[:1], x.shape[1], x.shape[2], 1)
    scores = torch.cat([scores, sink], -1)
    # A row without any term has the maximum -inf, and -inf - -inf is NaN.
    terms = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min))
    total = terms.sum(-1, keepdim=True)
    shares = terms / total.where(total > 0, 1.0)
    return shares[..., :-1], shares[..., -1]


@RULES.rule("masked_softmax_bwd")
def masked_softmax_bwd(dy, y, rest, sinks):
    inner = (dy * y).sum(-1, keepdim=True)
    dx = y * (dy - inner)
    return dx if sinks is None else (dx, -(rest * inner[..., 0]).sum((0, 2)).to(sinks.dtype))


@RULES.rule("gather_pages")
def gather_pages(pages, block_table):
    batch, heads, dim = block_table.shape[0], pages.shape[1], pages.shape[3]
    return pages[block_table.long()].transpose(1, 2).reshape(batch, heads, -1, dim)
