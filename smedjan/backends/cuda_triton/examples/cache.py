"""New tokens into the cache: Llama-3-8B (8 key heads of 128), SmolLM2-135M (3 of 64)."""

from __future__ import annotations

from smedjan.backends.cuda_triton.examples.example import Example, array

HEADS = (0, 2, 1, 3)
LENGTH = 1024

EXAMPLES = [
    Example(
        op="kv_write",
        name="bf16 a prompt of 2048",
        ins=(array(1, 8, 8192, 128), array(1, 8, 2048, 128, order=HEADS), LENGTH),
    ),
    Example(op="kv_write", name="bf16 a token", ins=(array(8, 8, 8192, 128), array(8, 8, 1, 128, order=HEADS), LENGTH)),
    Example(
        op="kv_write",
        name="f32 a token",
        ins=(array(1, 3, 2048, 64, dtype="float32"), array(1, 3, 1, 64, dtype="float32", order=HEADS), LENGTH),
    ),
]
