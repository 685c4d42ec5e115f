"""`model_type: glm4`: GLM-4-0414: GLM with norms before and behind each part."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models import glm
from smedjan.models.decoder_config import DecoderConfig, Names, Norm
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

ARCHITECTURE = "Glm4ForCausalLM"

MODULES = {
    **glm.MODULES,
    "attn_out": "post_self_attn_layernorm",
    "mlp_out": "post_mlp_layernorm",
}
KEYS = glm.KEYS


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=151552,
        hidden_size=4096,
        intermediate_size=13696,
        num_hidden_layers=40,
        num_attention_heads=32,
        max_position_embeddings=131072,
        num_key_value_heads=2,
        head_dim=128,
    )
    rope, scale = one_rope(reader, sizes, KEYS), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "glm4",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
            "norm": Norm(eps=reader.number("rms_norm_eps", 0.00000015625, open_low=True)),
            "names": Names(modules=MODULES),
            "biases": frozenset("qkv" if reader.flag("attention_bias", True) else ""),
            "interleaved": True,
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=None, eos=(151329, 151336, 151338), pad=151329),
        },
    )
