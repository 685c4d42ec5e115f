"""`model_type: llama`: Llama 1 to 3, SmolLM 1 and 2, TinyLlama, Yi, DeepSeek-LLM and their kin."""

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

ARCHITECTURE = "LlamaForCausalLM"


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        whole_heads=True,
    )
    halves = "smedjan rotates half-split pairs, as transformers does"
    reader.only("rope_interleaved", False, None, remedy=halves)
    reader.only("rope_traditional", False, None, remedy=halves)
    reader.only("sliding_window", None, remedy="a Llama attends to the whole context")
    attention_bias, mlp_bias = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    return finish(
        reader,
        {
            "model_type": "llama",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], one_rope(reader, sizes), sizes["head_dim"] ** -0.5),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True)),
            "biases": frozenset(("q", "k", "v", "o") * attention_bias + ("gate", "up", "down") * mlp_bias),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=1, eos=2, pad=None),
        },
    )
