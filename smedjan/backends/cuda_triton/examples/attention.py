"""Attention of Llama-3-8B (32/8 heads of 128), Qwen3-0.6B (16/8 of 128), SmolLM2-135M (9/3 of 64), Gemma 2 2B (8/4 of
256, capped, windows of 4096), gpt-oss-20b (64/8 of 64, sinks, windows of 128); 80 and 96 as Phi-2 and Phi-3-mini."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smedjan.backends.cuda_triton.examples.example import Example, array

INSIDE = (0, 2, 1, 3)


def stacked(batch: int, tokens: int, heads: tuple[int, int], dim: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as one stacked projection leaves them."""
    query_heads, key_heads = heads
    whole = array(batch, query_heads + 2 * key_heads, tokens, dim, dtype=dtype, order=INSIDE)
    q, k, v = whole.split([query_heads, key_heads, key_heads], dim=1)
    return q, k, v


def both(
    model: str,
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    *,
    batch: int = 1,
    dtype: str = "bfloat16",
    packed: bool = False,
    padded: bool = False,
    sinks: bool = False,
    **attrs: Any,
) -> list[Example]:
    """Forward and backward."""
    q, k, v = stacked(batch, tokens, heads, dim, dtype)
    y = array(batch, heads[0], tokens, dim, dtype=dtype, order=INSIDE)
    lse = array(batch, heads[0], tokens, dtype="float32")
    key_mask = array(batch, tokens, dtype="bool") if padded else None
    bound = array(batch, tokens, dtype="int32") if packed else None
    given = (q, k, v, key_mask, bound, bound, array(heads[0], dtype=dtype) if sinks else None)
    attrs = {"scale": dim**-0.5, **attrs}
    name = f"{ {'bfloat16': 'bf16', 'float32': 'f32'}[dtype] } {model} {batch} x {tokens}"
    name += ", packed" * packed + ", padded" * padded
    backward = (y, *given, y, lse)
    fill = {3: 1} if padded else {5: tokens} if packed else {}
    behind = {index + 1: number for index, number in fill.items()}
    return [
        Example(op="flash_attention", name=name, ins=given, attrs=attrs, fill=fill),
        Example(op="flash_attention_bwd", name=name, ins=backward, attrs={**attrs, "needs_sinks": sinks}, fill=behind),
    ]


def decoding(model: str, batch: int, heads: tuple[int, int], dim: int, *, queries: int = 1, **attrs: Any) -> Example:
    """New tokens over a cache of 8192 places."""
    q = array(batch, heads[0], queries, dim, order=INSIDE)
    cache = array(batch, heads[1], 8192, dim)
    ins = (q, cache, cache, None, array(dtype="int64"), None)
    name = f"bf16 {model} {batch} x {queries} over 8192"
    return Example(op="cached_attention", name=name, ins=ins, attrs={"scale": dim**-0.5, **attrs}, fill={4: 8192})


def paged(model: str, batch: int, heads: tuple[int, int], dim: int) -> Example:
    """One token each over pages of 16."""
    pages = array(batch * 512, heads[1], 16, dim)
    ins = (
        array(batch, heads[0], 1, dim, order=INSIDE),
        pages,
        pages,
        array(batch, 512, dtype="int32"),
        array(batch, dtype="int32"),
        None,
    )
    name = f"bf16 {model} {batch} x 1"
    return Example(op="paged_attention", name=name, ins=ins, attrs={"scale": dim**-0.5}, fill={4: 8192})


EXAMPLES = [
    *both("Llama-3-8B", 4096, (32, 8), 128),
    *both("Llama-3-8B", 8192, (32, 8), 128, packed=True),
    *both("Qwen3-0.6B", 2048, (16, 8), 128, batch=8, padded=True),
    *both("SmolLM2-135M", 2048, (9, 3), 64, batch=8),
    *both("SmolLM2-135M", 512, (9, 3), 64, dtype="float32"),
    *both("Gemma 2 2B", 8192, (8, 4), 256, cap=50.0, window=4096),
    *both("gpt-oss-20b", 4096, (64, 8), 64, sinks=True, window=128),
    *both("Phi-2", 2048, (32, 32), 80),
    *both("Phi-3-mini", 4096, (32, 32), 96),
    decoding("Llama-3-8B", 1, (32, 8), 128),
    decoding("SmolLM2-135M", 16, (9, 3), 64),
    decoding("Gemma 2 2B", 1, (8, 4), 256, cap=50.0, window=4096),
    decoding("Llama-3-8B", 1, (32, 8), 128, queries=512),
    paged("Llama-3-8B", 8, (32, 8), 128),
    Example(op="document_bounds", name="int64 4 x 8192", ins=(array(4, 8192, dtype="int64"),)),
]

EXPLAINED = {
    "flash_attention": "each block of queries reads the keys and values that it sees, from the second cache: at "
    "blocks of 128 queries, 128 FLOPs a byte and more",
    "flash_attention_bwd": "dk and dv read all queries, dq all keys, from the second cache; both compute the scores, "
    "so that no sum depends on an order; dy y is summed over heads' dims first",
    "cached_attention": "splits of the cache are summed in a second launch; each block of tokens reads the cache",
    "paged_attention": "splits of the pages are summed in a second launch",
    "document_bounds": "each block of tokens looks for where its document begins and ends, from the caches",
}
