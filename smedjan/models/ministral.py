"""`model_type: ministral`: Mistral with a sliding window in some of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.decoder_config import DecoderConfig, Norm
from smedjan.models.fields import (
    by_type,
    finish,
    one_rope,
    read_activation,
    read_dropout,
    read_pattern,
    read_sizes,
    read_tokens,
    read_window,
    start,
)

ARCHITECTURE = "MinistralForCausalLM"


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=131072,
        num_key_value_heads=8,
    )
    window, count = read_window(reader, 4096), sizes["num_hidden_layers"]
    default = ["full_attention" if window is None else "sliding_attention"] * count
    types = read_pattern(reader, count, default, window=window)
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "ministral",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": by_type(types, rope, scale, window),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True)),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=1, eos=2, pad=None),
        },
    )
