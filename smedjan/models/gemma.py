"""`model_type: gemma`: Gemma 1: (1 + w) norms, GELU, embeddings scaled by sqrt(H)."""

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

ARCHITECTURE = "GemmaForCausalLM"


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        max_position_embeddings=8192,
        num_key_value_heads=16,
        head_dim=256,
    )
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    act = read_activation(reader, "gelu_pytorch_tanh")
    reader.only("hidden_activation", None, "gelu_pytorch_tanh", remedy="Gemma computes GELU by tanh")
    return finish(
        reader,
        {
            "model_type": "gemma",
            "architecture": ARCHITECTURE,
            **sizes,
            # Google's files say gelu and mean its tanh form; transformers reads them so too.
            "hidden_act": "gelu_pytorch_tanh" if act == "gelu" else act,
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True), weight_cast="after", offset=1.0),
            "biases": frozenset("qkvo" if reader.flag("attention_bias", False) else ""),
            "embedding_scale": sizes["hidden_size"] ** 0.5,
            "round_embedding_scale": True,
            "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=2, eos=1, pad=0),
        },
    )
