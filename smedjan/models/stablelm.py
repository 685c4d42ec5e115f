"""`model_type: stablelm`: StableLM 2 and 3B: layer norms, partial rotation, a norm of its own for each head."""

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
from smedjan.models.rope import RopeKeys

ARCHITECTURE = "StableLmForCausalLM"

KEYS = RopeKeys(partial="partial_rotary_factor", default_partial=0.25)


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=50304,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        num_key_value_heads=32,
        derived_head_dim=True,
        whole_heads=True,
    )
    reader.only("rotary_scaling_factor", 1.0, 1, None, remedy="give rope_scaling: transformers does not read it")
    parallel, qk_norm = reader.flag("use_parallel_residual", False), reader.flag("qk_layernorm", False)
    modules = {role: LLAMA_MODULES[role] for role in "qkvo"}
    if qk_norm:
        modules.update(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm")
    modules.update((role, LLAMA_MODULES[role]) for role in ("gate", "up", "down", "attn_in"))
    if not parallel:
        modules["mlp_in"] = LLAMA_MODULES["mlp_in"]
    rope, scale = one_rope(reader, sizes, KEYS), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "stablelm",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
            "norm": Norm(kind="layer_norm", eps=reader.number("layer_norm_eps", 1e-5, open_low=True), bias=True),
            "names": Names(modules=modules),
            "biases": frozenset("qkv" if reader.flag("use_qkv_bias", False) else ""),
            "parallel": "residual_first" if parallel else "",
            "qk_norm": "each" if qk_norm else "",
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0, hidden_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=0, eos=0, pad=None),
        },
    )
