"""`model_type: helium`: Helium 2B: Llama whose neighbouring pairs turn."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
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
from smedjan.models.rope import RopeKeys

ARCHITECTURE = "HeliumForCausalLM"

KEYS = RopeKeys(default_theta=100_000.0)


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=48000,
        hidden_size=2560,
        intermediate_size=7040,
        num_hidden_layers=24,
        num_attention_heads=20,
        max_position_embeddings=4096,
        num_key_value_heads=20,
        head_dim=128,
    )
    if sizes["num_attention_heads"] * sizes["head_dim"] != sizes["hidden_size"]:
        raise reader.contradiction(
            "head_dim", "hidden_size", "are not one over the other", "hidden_size is num_attention_heads * head_dim"
        )
    attention_bias, mlp_bias = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    rope, scale = one_rope(reader, sizes, KEYS), 1 / sqrt(sizes["head_dim"])
    return finish(
        reader,
        {
            "model_type": "helium",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-8, open_low=True), weight_cast="after"),
            "biases": frozenset(("q", "k", "v") * attention_bias + ("gate", "up", "down") * mlp_bias),
            "interleaved": True,
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=1, eos=2, pad=3),
        },
    )
