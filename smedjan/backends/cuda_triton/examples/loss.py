"""Heads of SmolLM2-135M, Qwen3-0.6B, Llama-3-8B, Gemma 2 (capped) and GPT-2 (rows that only padding aligns)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from smedjan.backends.cuda_triton.examples.example import Example, array

HEADS: dict[str, tuple[int, int, int, str, dict[str, float]]] = {
    "bf16 SmolLM2-135M": (4096, 576, 49152, "bfloat16", {}),
    "f32 SmolLM2-135M": (4096, 576, 49152, "float32", {}),
    "bf16 GPT-2": (1024, 768, 50257, "bfloat16", {}),
    "bf16 Qwen3-0.6B": (4096, 1024, 151936, "bfloat16", {}),
    "bf16 Llama-3-8B": (8192, 4096, 128256, "bfloat16", {}),
    "bf16 Gemma 2 2B": (4096, 2304, 256000, "bfloat16", {"cap": 30.0}),
    "f32 capped": (1024, 576, 49152, "float32", {"cap": 30.0}),
}
"""Trained rows, width, vocabulary, dtype, what shapes the logits."""

TEACHERS = {"bf16 SmolLM2-135M": 2048, "bf16 Qwen3-0.6B": 2560, "bf16 Llama-3-8B": 8192, "f32 capped": 576}
"""A teacher's width."""


def _examples(name: str, rows: int, width: int, vocab: int, dtype: str, shaping: dict[str, float]) -> Iterator[Example]:
    x, weight = array(rows, width, dtype=dtype), array(vocab, width, dtype=dtype)
    labels, items = array(rows, dtype="int64"), array(dtype="float32")
    for grads in ("xw", "x", ""):
        attrs: dict[str, Any] = {"grads": grads, "z_loss": 1e-4, **shaping}
        told = f"{name} grads {grads or 'none'}"
        yield Example(op="linear_cross_entropy", name=told, ins=(x, weight, labels, items), attrs=attrs)
    if name in TEACHERS:
        attrs = {"grads": "x", "z_loss": 0.0, "smoothing": 0.1, **shaping}
        told = f"{name} smoothed"
        yield Example(op="linear_cross_entropy", name=told, ins=(x, weight, labels, items), attrs=attrs)
    yield Example(op="linear_log_probs", name=name, ins=(x, weight, labels), attrs=shaping)
    ins = (array(rows, dtype="float32"), x, weight, labels, array(rows, 2, dtype="float32"))
    for needs in ((True, True), (True, False)):
        attrs = {"needs": needs, "scaling": 1.0, "divisor": 1.0, "cap": 0.0, **shaping}
        told = f"{name} needs {'xw' if all(needs) else 'x'}"
        yield Example(op="linear_log_probs_bwd", name=told, ins=ins, attrs=attrs)
    if name not in TEACHERS:
        return
    teacher = (array(rows, TEACHERS[name], dtype=dtype), array(vocab, TEACHERS[name], dtype=dtype))
    for direction in ("forward", "reverse"):
        attrs = {"grads": "xw", "direction": direction, "temperature": 2.0, **shaping}
        attrs |= {f"teacher_{key}": value for key, value in shaping.items()}
        told = f"{name} {direction}"
        yield Example(op="linear_kl", name=told, ins=(x, weight, *teacher, labels, items), attrs=attrs)


EXAMPLES = [example for name, head in HEADS.items() for example in _examples(name, *head)]

EXPLAINED = {
    "linear_cross_entropy": (
        "a chunk's logits are written by a product, read twice and overwritten with their gradients, and read "
        "by the next products; these decide the time, at more FLOPs a byte than the GPU has"
    ),
    "linear_kl": (
        "a chunk's logits, the teacher's too, are written by products, read twice, and read by the next "
        "products; these decide the time"
    ),
    "linear_log_probs": "a chunk's logits are written by a product, which decides the time, and read once",
    "linear_log_probs_bwd": (
        "a chunk's logits are written by a product, overwritten with their gradients, and read by the next "
        "products, which decide the time"
    ),
}
