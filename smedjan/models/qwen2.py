"""`model_type: qwen2`: Qwen 1.5, 2 and 2.5: biases on q, k and v; a window from some layer on."""

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
    read_late_windows,
    read_sizes,
    read_tokens,
    start,
)

ARCHITECTURE = "Qwen2ForCausalLM"


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.optional("head_dim")
    sizes = read_sizes(
        reader,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=32768,
        num_key_value_heads=32,
    )
    reader.only("use_mrope", False, None, remedy="positions of a text have one dimension")
    window, types = read_late_windows(reader, sizes["num_hidden_layers"])
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "qwen2",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": by_type(types, rope, scale, window),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True)),
            "biases": frozenset("qkv"),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=None, eos=None, pad=None),
        },
    )
