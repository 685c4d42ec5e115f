"""mlx-lm's quantised directories, made by mlx-lm itself, and its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from transformers import AutoModelForCausalLM

import smedjan
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

SAID: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 32},
    "starcoder2": {"hidden_act": "gelu"},
    "gpt_neox": {"intermediate_size": 256, "hidden_act": "gelu_new"},
    "glm": {"partial_rotary_factor": 1.0},
    "exaone4": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window_pattern": "LLLG"},
}
"""What mlx-lm has of a family whose first case it has otherwise: `tests/hf/test_round_trip.py` says why."""
NOT_THERE = ("ministral", "arcee", "vaultgemma", "gpt2")
"""mlx-lm has no such model_type, or, for GPT-2, other tensors than transformers."""


def _first(family: str) -> dict[str, Any]:
    first = next(iter(CASES[family].values()))
    return {**first, **{key: value for key, value in SIZES.items() if key in first}, **SAID.get(family, {})}


FAMILIES = {family: (family, _first(family)) for family in CASES if family not in NOT_THERE}


def make_imported(model: str, out: Path, dtype: str = "float32") -> Path:
    """A model as we write it: with the keys that mlx-lm reads."""
    family, config = MODELS.get(model) or FAMILIES[model]
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


def logits_of(directory: Path, backend: str, **options: Any) -> torch.Tensor:
    model = smedjan.load(directory, backend=backend, attention="eager", **options)
    return torch.from_numpy(model.logits(IDS.numpy()))


def dequantised(directory: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' logits of the weights that the codes stand for: in their dtype, and in float64."""
    report = import_model(directory, out)
    assert report.source_quantization
    assert "quantization" not in json.loads((out / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=report.dtype).eval()
    with torch.no_grad():
        return model(IDS).logits.float(), model.double()(IDS).logits


def mlx_adapter(
    base: Path, folder: Path, settings: dict[str, Any], blocks: int, *, dora: bool = False
) -> tuple[Path, torch.Tensor]:
    """(directory, logits) of a random adapter that mlx-lm made and saved, as `mlx_lm.lora` does."""
    model, _ = load_model(base)
    linear_to_lora_layers(model, blocks, dict(settings), use_dora=dora)
    generator = np.random.default_rng(0)
    made = {}
    for name, array in tree_flatten(model.parameters()):
        part = name.rpartition(".")[2]
        drawn = generator.normal(size=array.shape).astype(np.float32)
        if part in ("lora_a", "lora_b"):
            made[name] = mx.array(0.1 * drawn)
        elif part == "m":
            made[name] = array * mx.array(1 + 0.2 * drawn)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), made)
    kind = "dora" if dora else "lora"
    save_config(
        {"model": str(base), "fine_tune_type": kind, "num_layers": blocks, "lora_parameters": settings, "seed": 0},
        folder / "adapter_config.json",
    )
    return folder, adapted_logits(base, folder)


def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    model, _ = load_model(base)
    model = load_adapters(model, str(adapter))
    model.eval()  # as mlx_lm.load leaves it
    return torch.from_numpy(np.array(model(mx.array(IDS.numpy()))))
