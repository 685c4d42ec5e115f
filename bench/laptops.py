"""The table of docs/laptops.md: what the planner says of models of known shapes on mlx_metal. No weight is read.

    python bench/laptops.py

A test makes it anew and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smedjan.backends.base import Forms
from smedjan.backends.mlx_metal import MlxBackend
from smedjan.models.registry import read_config
from smedjan.train.macs import macs
from smedjan.train.outline import planned_bytes
from smedjan.train.plan import outline_of

LENGTH = 1024

METHODS = {"qlora": "`qlora`, 4 bits", "lora": "`lora`", "full": "`full`"}


def llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **more,
    }


MODELS = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152),
    "Qwen2.5-0.5B": llama(896, 4864, 24, 14, 2, 151936, model_type="qwen2"),
    "Qwen2.5-1.5B": llama(1536, 8960, 28, 12, 2, 151936, model_type="qwen2"),
    "Llama-3.2-3B": llama(3072, 8192, 28, 24, 8, 128256, head_dim=128),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False),
}


def planned(data: dict[str, Any], method: str) -> int:
    """Bytes of a step of one row of LENGTH tokens in bfloat16, every token trained."""
    config = read_config(data, Path("config.json"))
    backend = MlxBackend(compiled=True)  # as on a Mac, where MLX fuses what lies between products
    outline, form = outline_of(config, backend, dtype="bfloat16", batch=1, length=LENGTH, method=method)
    return planned_bytes(outline, outline.micro(form), forms=Forms(lengths=1, rows=1))


def table() -> str:
    lines = [f"| model | {' | '.join(METHODS.values())} |", "|---" * (1 + len(METHODS)) + "|"]
    for name, data in MODELS.items():
        cells = []
        for method in METHODS:
            needed = planned(data, method)
            smallest = next((mac.gigabytes for mac in macs(needed) if mac.fits), None)
            cells.append(f"{needed / 1e9:.1f} GB: " + ("none of these" if smallest is None else f"{smallest} GB"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
