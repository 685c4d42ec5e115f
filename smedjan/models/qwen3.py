"""`model_type: qwen3`: Qwen 3, dense: a norm over each head of q and k."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.decoder_config import LLAMA_MODULES, DecoderConfig, Names, Norm
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

ARCHITECTURE = "Qwen3ForCausalLM"

MODULES = {
    **{role: LLAMA_MODULES[role] for role in "qkvo"},
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    **{role: LLAMA_MODULES[role] for role in ("gate", "up", "down", "attn_in", "mlp_in")},
}


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=22016,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=32768,
        num_key_value_heads=32,
        head_dim=128,
    )
    window, types = read_late_windows(reader, sizes["num_hidden_layers"])
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "qwen3",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": by_type(types, rope, scale, window),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True)),
            "names": Names(modules=MODULES),
            "biases": frozenset("qkvo" if reader.flag("attention_bias", False) else ""),
            "qk_norm": "head_first",
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=None, eos=None, pad=None),
        },
    )
