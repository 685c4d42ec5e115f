"""Models of known shapes with random weights, written where both sides of `bench/mac.py` read them: nothing is loaded
from anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor, TensorSpec
from smedjan.checkpoint.safetensors import save_sharded
from smedjan.models.registry import read_config
from smedjan.ops.quantized import Affine

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's config.json, the format of its weights (None: bfloat16), and how it is run."""

    config: dict[str, Any]
    affine: Affine | None
    batch: int
    length: int
    prompt: int
    tokens: int


def _config(
    kind: str, hidden: int, inner: int, layers: int, heads: int, groups: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **more,
    }


FOUR_BITS = Affine(bits=4, group_size=64)

SHAPES = {
    "qwen2.5-0.5b": Shape(
        config=_config("qwen2", 896, 4864, 24, 14, 2, 151936),
        affine=None,
        batch=4,
        length=1024,
        prompt=1024,
        tokens=128,
    ),
    "qwen2.5-1.5b": Shape(
        config=_config("qwen2", 1536, 8960, 28, 12, 2, 151936),
        affine=None,
        batch=2,
        length=1024,
        prompt=1024,
        tokens=128,
    ),
    "llama-3.1-8b-4bit": Shape(
        config=_config(
            *("llama", 4096, 14336, 32, 32, 8, 128256),
            **{"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
            **{"max_position_embeddings": 131072, "rope_scaling": LLAMA3},
        ),
        affine=FOUR_BITS,
        batch=1,
        length=1024,
        prompt=1024,
        tokens=128,
    ),
}
"""Qwen/Qwen2.5-0.5B, Qwen/Qwen2.5-1.5B and meta-llama/Llama-3.1-8B, as far as their config.json decides what is
computed."""

TINY = {
    "tiny": Shape(config=_config("llama", 64, 192, 2, 4, 2, 512), affine=None, batch=2, length=32, prompt=24, tokens=6),
    "tiny-4bit": Shape(
        config=_config("llama", 64, 192, 2, 4, 2, 512), affine=FOUR_BITS, batch=1, length=32, prompt=24, tokens=6
    ),
}
"""For the test of this bench, which runs on MLX's CPU build: their figures say nothing."""

STEP, LOWEST = 0.006, -0.045
"""A code's scale and bias: 16 codes from -0.045 to 0.045, of a deviation near 0.027."""


def write(shape: Shape, folder: Path) -> None:
    """The model as a directory, tensor by tensor: bfloat16 weights of deviation 0.02, norms of ones, or codes."""
    config = read_config(shape.config, folder / "config.json")
    data, entries = dict(shape.config), dict[str, LazyTensor]()
    narrow = {config.embedding, config.head, *config.linear_weights()} if shape.affine else set[str]()
    for number, (name, dims) in enumerate(config.parameter_shapes().items()):
        if shape.affine is not None and name in narrow:
            for suffix, spec in shape.affine.specs(dims, "bfloat16").items():
                stored = name if suffix == "affine" else f"{name.removesuffix('.weight')}.{suffix}"
                kind = TensorSpec(dtype=spec.dtype, shape=spec.shape)
                entries[stored] = LazyTensor(spec=kind, file=folder, load=partial(_codes, kind, suffix, number))
        else:
            kind = TensorSpec(dtype="bfloat16", shape=dims)
            entries[name] = LazyTensor(spec=kind, file=folder, load=partial(_weight, kind, number))
    if shape.affine is not None:
        said = {"group_size": shape.affine.group_size, "bits": shape.affine.bits, "mode": "affine"}
        data |= {"quantization": said, "quantization_config": said}
    folder.mkdir(parents=True)
    save_sharded(folder, LazyTensors(entries))
    (folder / "config.json").write_text(json.dumps(data, indent=1) + "\n")


def _weight(spec: TensorSpec, number: int) -> RawTensor:
    if len(spec.shape) == 1:
        values = np.ones(spec.shape, dtype=np.float32)
    else:
        values = np.random.default_rng(number).standard_normal(spec.shape, dtype=np.float32) * np.float32(0.02)
    return convert(RawTensor.of(values), spec.dtype)


def _codes(spec: TensorSpec, suffix: str, number: int) -> RawTensor:
    if suffix == "affine":
        drawn = np.random.default_rng(number).integers(0, 1 << 32, spec.shape, dtype=np.uint32)
        return RawTensor.of(drawn)
    value = STEP if suffix == "scales" else LOWEST
    return convert(RawTensor.of(np.full(spec.shape, value, dtype=np.float32)), spec.dtype)
