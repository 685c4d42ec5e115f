"""mlx-lm's quantised directories, made by mlx-lm itself, and its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from smedjan.hf.import_model import import_model
from tests.conftest import VOCAB
from tests.families import CASES, make_model

IDS = torch.randint(4, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**CASES["llama"]["plain"], **SIZES}),
    "llama, tied and biased": ("llama", {**CASES["llama"]["biases-tied"], **SIZES}),
    "qwen3": ("qwen3", {**CASES["qwen3"]["plain"], **SIZES}),
    "phi3": ("phi3", {key: value for key, value in {**CASES["phi3"]["plain"], **SIZES}.items() if key != "head_dim"}),
    "gemma3_text": ("gemma3_text", {**CASES["gemma3_text"]["plain"], **SIZES}),
}
"""sqrt(64) is 8: what mlx-lm rounds for Gemma, in float32 too, is exact."""


def make_imported(model: str, out: Path, dtype: str = "float32") -> Path:
    """A model as we write it: with the keys that mlx-lm reads."""
    family, config = MODELS[model]
    make_model(family, config, dtype=dtype, attention="eager").save_pretrained(out.with_name(f"{out.name}-source"))
    import_model(out.with_name(f"{out.name}-source"), out)
    return out


def mlx_quantized(source: Path, out: Path, *, bits: int = 4, group_size: int = 32, **options: Any) -> Path:
    """What `mlx_lm.convert(quantize=True)` writes, without its tokenizer."""
    model, config = load_model(source, strict=True)
    model, config = quantize_model(model, config, group_size, bits, **options)
    save_model(out, model)
    save_config(config, out / "config.json")
    return out


def mlx_logits(directory: Path) -> torch.Tensor:
    model, _ = load_model(directory, strict=True)
    return torch.from_numpy(np.array(model(mx.array(IDS.numpy())).astype(mx.float32)))
