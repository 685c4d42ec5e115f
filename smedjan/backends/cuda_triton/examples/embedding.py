"""Embeddings of SmolLM2-135M (49152 x 576), Qwen3-0.6B (151936 x 1024) and Llama-3-8B (128256 x 4096)."""

from __future__ import annotations

from smedjan.backends.cuda_triton.examples.example import Example, array

IDS = array(4, 2048, dtype="int64")
ROWS = array(4096, dtype="int64")


def _embedding(name: str, vocab: int, width: int, dtype: str = "bfloat16") -> list[Example]:
    dy, weight = array(4, 2048, width, dtype=dtype), array(vocab, width, dtype=dtype)
    backward = {"vocab_size": vocab, "padding_idx": None}
    return [
        Example(op="embedding", name=name, ins=(IDS, weight), attrs={"padding_idx": None}, fill={0: range(vocab)}),
        Example(op="embedding_bwd", name=name, ins=(dy, IDS), attrs=backward, fill={1: range(vocab)}),
    ]


EXAMPLES = [
    *_embedding("bf16 49152 x 576", 49152, 576),
    *_embedding("f32 49152 x 576", 49152, 576, "float32"),
    *_embedding("bf16 151936 x 1024", 151936, 1024),
    *_embedding("bf16 128256 x 4096", 128256, 4096),
    Example(op="take_rows", name="bf16 4096 of 8192 x 1024", ins=(array(8192, 1024), ROWS)),
    Example(op="take_rows_bwd", name="bf16 4096 of 8192 x 1024", ins=(array(4096, 1024), ROWS), attrs={"size": 8192}),
]

EXPLAINED = {
    "embedding_bwd": (
        "a memset before the rows that tokens have; every token compares its id with all others' to find its "
        "place, in the caches"
    ),
    "take_rows_bwd": "a memset, then the rows that were taken are written over it",
}
