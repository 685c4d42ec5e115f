"""`model_type: granite`: Granite 3: Llama with multipliers of embeddings, residuals, scores and logits."""

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

ARCHITECTURE = "GraniteForCausalLM"


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.optional("head_dim")
    sizes = read_sizes(
        reader,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
    )
    attention_bias, mlp_bias = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    rope, scale = one_rope(reader, sizes), reader.number("attention_multiplier", 1.0, open_low=True)
    return finish(
        reader,
        {
            "model_type": "granite",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True)),
            "biases": frozenset(("q", "k", "v", "o") * attention_bias + ("gate", "up", "down") * mlp_bias),
            "embedding_scale": reader.number("embedding_multiplier", 1.0, open_low=True),
            "residual_scale": reader.number("residual_multiplier", 1.0, open_low=True),
            "logit_divisor": reader.number("logits_scaling", 1.0, open_low=True),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=1, eos=2, pad=None),
        },
    )
