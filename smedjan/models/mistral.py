"""`model_type: mistral`: Mistral 7B and its kin: Llama with one sliding window for all layers."""

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
    read_window,
    start,
    uniform,
)

ARCHITECTURE = "MistralForCausalLM"


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
    window = read_window(reader, 4096)
    reader.only("layer_types", None, remedy="models whose layers differ are of model_type ministral")
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "mistral",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale, window),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True)),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=1, eos=2, pad=None),
        },
    )
