"""Adapted layers of SmolLM2-135M, Qwen3-0.6B and Llama-3-8B: q, k and v, gate and up, one layer alone."""

from __future__ import annotations

from smedjan.backends.cuda_triton.examples.example import Example, array


def _group(
    name: str,
    rows: int,
    depth: int,
    widths: tuple[int, ...],
    rank: int,
    *,
    adapted: tuple[bool, ...] | None = None,
    biased: bool = False,
    dtype: str = "bfloat16",
) -> list[Example]:
    """Forward, and backward with a waiting cotangent."""
    adapted = adapted or (True,) * len(widths)
    weights = [array(width, depth, dtype=dtype) for width in widths]
    biases = [array(width, dtype=dtype) for width in widths] if biased else []
    with_adapter = [width for width, has in zip(widths, adapted, strict=True) if has]
    adapters = [array(rank, depth, dtype="float32") for _ in with_adapter]
    adapters += [array(width, rank, dtype="float32") for width in with_adapter]
    x, y = array(rows, depth, dtype=dtype), array(rows, sum(widths), dtype=dtype)
    low = array(rows, rank * len(with_adapter), dtype="float32")
    return [
        Example(
            op="lora_linear_group",
            name=name,
            ins=(x, *weights, *biases, *adapters),
            attrs={"adapted": adapted, "biased": biased, "scaling": 2.0},
        ),
        Example(
            op="lora_linear_group_bwd",
            name=name,
            ins=(y, x, low, x, *weights, *adapters),
            attrs={"adapted": adapted, "needs": (True, True), "scaling": 2.0},
        ),
    ]


def _layer(name: str, rows: int, depth: int, width: int, rank: int) -> list[Example]:
    """Forward, and backward where nothing waits."""
    x, y, low = array(rows, depth), array(rows, width), array(rows, rank, dtype="float32")
    weight, a, b = array(width, depth), array(rank, depth, dtype="float32"), array(width, rank, dtype="float32")
    return [
        Example(op="lora_linear", name=name, ins=(x, weight, None, a, b), attrs={"scaling": 2.0}),
        Example(
            op="lora_linear_bwd",
            name=name,
            ins=(y, x, weight, a, b, low, None),
            attrs={"needs": (True, True, True), "scaling": 2.0},
        ),
    ]


EXAMPLES = [
    *_group("bf16 Qwen3-0.6B qkv r 16", 8192, 1024, (2048, 1024, 1024), 16),
    *_group("bf16 Qwen2-0.5B q, v of qkv r 8", 8192, 896, (896, 128, 128), 8, adapted=(True, False, True), biased=True),
    *_group("bf16 SmolLM2-135M qkv r 8", 8192, 576, (576, 192, 192), 8),
    *_group("bf16 Llama-3-8B qkv r 16", 8192, 4096, (4096, 1024, 1024), 16),
    *_group("bf16 Llama-3-8B qkv r 64", 8192, 4096, (4096, 1024, 1024), 64),
    *_group("bf16 Llama-3-8B gate, up r 16", 8192, 4096, (14336, 14336), 16),
    *_group("bf16 Llama-3-8B qkv r 16, 512 rows", 512, 4096, (4096, 1024, 1024), 16),
    *_group("bf16 Llama-3-8B qkv r 16, 64 rows", 64, 4096, (4096, 1024, 1024), 16),
    *_group("bf16 Llama-3-8B qkv r 16, 1 row", 1, 4096, (4096, 1024, 1024), 16),
    *_group("f32 SmolLM2-135M qkv r 8", 8192, 576, (576, 192, 192), 8, dtype="float32"),
    *_layer("bf16 Qwen3-0.6B o r 16", 8192, 2048, 1024, 16),
    *_layer("bf16 Llama-3-8B down r 16", 8192, 14336, 4096, 16),
]

TILES = (
    "products: a tile reads its rows of x and its columns of the weight, from the second cache but for the "
    "first time; what adapters save of x (`low`) and the splits of their gradients are written and read again"
)

EXPLAINED = dict.fromkeys(("lora_linear_group", "lora_linear_group_bwd", "lora_linear", "lora_linear_bwd"), TILES)
