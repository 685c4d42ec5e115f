"""`model_type: arcee`: AFM: Llama with a squared-ReLU MLP that has no gate."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.decoder_config import LLAMA_MODULES, DecoderConfig, Names, Norm
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

ARCHITECTURE = "ArceeForCausalLM"

MODULES = {role: LLAMA_MODULES[role] for role in ("q", "k", "v", "o", "up", "down", "attn_in", "mlp_in")}


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=32000,
        hidden_size=2560,
        intermediate_size=18432,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        whole_heads=True,
    )
    attention_bias, mlp_bias = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "arcee",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "relu2"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-5, open_low=True)),
            "names": Names(modules=MODULES),
            "biases": frozenset(("q", "k", "v", "o") * attention_bias + ("up", "down") * mlp_bias),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=128000, eos=128001, pad=None),
        },
    )
