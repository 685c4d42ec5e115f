"""`model_type: seed_oss`: Seed-OSS: Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.decoder_config import DecoderConfig, Norm
from smedjan.models.fields import (
    finish,
    one_rope,
    read_activation,
    read_dropout,
    read_sizes,
    read_tokens,
    start,
    uniform,
)

ARCHITECTURE = "SeedOssForCausalLM"


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=155136,
        hidden_size=4096,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=80,
        max_position_embeddings=524288,
        num_key_value_heads=8,
        head_dim=128,
    )
    qkv, out, mlp = (
        reader.flag(name, default)
        for name, default in (("attention_bias", True), ("attention_out_bias", False), ("mlp_bias", False))
    )
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "seed_oss",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True)),
            "biases": frozenset(("q", "k", "v") * qkv + ("o",) * out + ("gate", "up", "down") * mlp),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.1, residual_dropout=0.1),
            **read_tokens(reader, sizes["vocab_size"], bos=0, eos=2, pad=1),
        },
    )
