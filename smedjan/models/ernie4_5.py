"""`model_type: ernie4_5`: ERNIE 4.5, dense: neighbouring pairs turn, in float32."""

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
from smedjan.models.rope import RopeKeys

ARCHITECTURE = "Ernie4_5ForCausalLM"

KEYS = RopeKeys(default_theta=500_000.0)


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=103424,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=18,
        num_attention_heads=16,
        max_position_embeddings=131072,
        num_key_value_heads=2,
        head_dim=128,
    )
    rope, scale = one_rope(reader, sizes, KEYS), sizes["head_dim"] ** -0.5
    linears = ("q", "k", "v", "o", "gate", "up", "down")
    return finish(
        reader,
        {
            "model_type": "ernie4_5",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-5, open_low=True)),
            "biases": frozenset(linears if reader.flag("use_bias", False) else ()),
            "interleaved": True,
            "rope_dtype": "float32",
            "rope_upcast": "terms",
            "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=1, eos=2, pad=0),
        },
    )
