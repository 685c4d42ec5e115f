"""`model_type: vaultgemma`: VaultGemma: Gemma 2 without the norms behind its parts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.decoder_config import LLAMA_MODULES, DecoderConfig, Names, Norm
from smedjan.models.fields import (
    by_type,
    every_nth,
    finish,
    one_rope,
    read_activation,
    read_cap,
    read_dropout,
    read_pattern,
    read_sizes,
    read_tokens,
    read_window,
    start,
)

ARCHITECTURE = "VaultGemmaForCausalLM"

MODULES = {
    **{role: LLAMA_MODULES[role] for role in ("q", "k", "v", "o", "gate", "up", "down")},
    "attn_in": "input_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
}


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        max_position_embeddings=8192,
        num_key_value_heads=4,
        head_dim=256,
        whole_heads=True,
    )
    count, window = sizes["num_hidden_layers"], read_window(reader, 4096)
    types = read_pattern(reader, count, every_nth(count, 2), window=window)
    rope, scale = one_rope(reader, sizes), reader.integer("query_pre_attn_scalar", 256, low=1) ** -0.5
    return finish(
        reader,
        {
            "model_type": "vaultgemma",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "gelu_pytorch_tanh", "hidden_activation"),
            "layers": by_type(types, rope, scale, window),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True), weight_cast="after", offset=1.0),
            "names": Names(modules=MODULES),
            "biases": frozenset("qkvo" if reader.flag("attention_bias", False) else ""),
            "embedding_scale": sizes["hidden_size"] ** 0.5,
            "round_embedding_scale": True,
            "attention_cap": read_cap(reader, "attn_logit_softcapping", 50.0),
            "logit_cap": read_cap(reader, "final_logit_softcapping", 30.0),
            "sdpa": False,
            "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=2, eos=1, pad=0),
        },
    )
