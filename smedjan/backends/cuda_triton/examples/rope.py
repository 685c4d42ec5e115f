"""Rotations of the heads of SmolLM2-135M, Qwen3-0.6B, Llama-3-8B and others' kinds, in training and decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from smedjan.backends.cuda_triton.examples.example import Example, array
from smedjan.ops.rope import RopeConfig

HEADS = (0, 2, 1, 3)


def _x(batch: int, heads: int, tokens: int, dim: int, dtype: str) -> Any:
    return array(batch, heads, tokens, dim, dtype=dtype, order=HEADS)


def _rotation(
    model: str,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    *,
    dim: int = 0,
    norm: bool = False,
    interleaved: bool = False,
    batch: int = 4,
    tokens: int = 2048,
    dtype: str = "bfloat16",
) -> Iterator[Example]:
    q, k = (_x(batch, heads, tokens, head_dim, dtype) for heads in (q_heads, k_heads))
    table = array(1, 1, tokens, dim or head_dim, dtype=dtype)
    weight = array(head_dim, dtype=dtype) if norm else None
    name = f"{'bf16' if dtype == 'bfloat16' else 'f32'} {model} {batch} x {tokens}"
    turn = {"interleaved": interleaved, "upcast": ""}
    attrs = {**turn, "eps": 1e-6, "weight_cast": "before", "offset": 0.0}
    yield Example(op="qk_norm_rope", name=name, ins=(q, k, weight, weight, table, table), attrs=attrs)
    if tokens == 1:
        return
    raw = (q, k) if norm else (None, None)
    ins = (q, k, *raw, weight, weight, table, table)
    for needs in ((True,) * 4, (True, True, False, False)) if norm else ((True, True, False, False),):
        wanted = " dq dk" + (" dw" if needs[2] else "")
        yield Example(op="qk_norm_rope_bwd", name=name + wanted, ins=ins, attrs={**attrs, "needs": needs})
    if not norm:
        yield Example(op="rope", name=name, ins=(q, table, table), attrs=turn)
        yield Example(op="rope_bwd", name=name, ins=(q, table, table), attrs=turn)


def _tables(name: str, head_dim: int, dtype: str = "bfloat16", *, interleaved: bool = False, **rope: Any) -> Example:
    attrs = {"rope": RopeConfig(**rope), "head_dim": head_dim, "dtype": dtype, "interleaved": interleaved}
    return Example(op="rope_tables", name=name, ins=(array(4, 2048, dtype="int64"),), attrs=attrs)


FACTORS: dict[str, Any] = {"short_factor": (1.0,) * 48, "long_factor": (2.0,) * 48}
EXAMPLES = [
    *_rotation("SmolLM2-135M", 9, 3, 64),
    *_rotation("SmolLM2-135M", 9, 3, 64, dtype="float32"),
    *_rotation("Qwen3-0.6B", 16, 8, 128, norm=True),
    *_rotation("Qwen3-0.6B", 16, 8, 128, norm=True, batch=1, tokens=1),
    *_rotation("Qwen3-0.6B", 16, 8, 128, norm=True, dtype="float32"),
    *_rotation("Llama-3-8B", 32, 8, 128),
    *_rotation("Phi-2", 32, 32, 80, dim=32),
    *_rotation("Phi-3-mini", 32, 32, 96),
    *_rotation("Cohere", 32, 8, 128, interleaved=True),
    *_rotation("normed pairs of a part", 16, 8, 128, dim=64, norm=True, interleaved=True),
    *_rotation("Qwen3-Next", 16, 2, 256, dim=64, norm=True),
    *_rotation("Gemma-3-4B", 8, 4, 256, norm=True),
    _tables("bf16 Llama-3-8B", 128, rope_theta=500000.0),
    _tables("f32 SmolLM2-135M", 64, "float32", rope_theta=100000.0),
    _tables("bf16 Cohere", 128, interleaved=True),
    _tables("bf16 dynamic", 64, rope_type="dynamic", factor=2.0, max_position_embeddings=2048),
    _tables(
        "bf16 Phi-3-mini-128k",
        96,
        rope_type="longrope",
        factor=32.0,
        original_max_position_embeddings=4096,
        **FACTORS,
    ),
]

EXPLAINED = {
    "rope": "cos and sin of a token are read for each group of heads, from the caches",
    "rope_bwd": "cos and sin of a token are read for each group of heads, from the caches",
    "qk_norm_rope": "cos and sin of a token are read for each group of heads, from the caches",
    "qk_norm_rope_bwd": (
        "cos and sin of a token are read for each group of heads, from the caches; shares of the weights' "
        "gradients are summed in a second launch"
    ),
}
