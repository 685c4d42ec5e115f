"""`model_type: phi3`: Phi-3 and Phi-4: fused qkv and gate_up, long positions by longrope, partial rotation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.decoder_config import DecoderConfig, Names, Norm
from smedjan.models.fields import (
    finish,
    one_rope,
    read_activation,
    read_dropout,
    read_sizes,
    read_tokens,
    read_window,
    start,
    uniform,
)
from smedjan.models.rope import RopeKeys

ARCHITECTURE = "Phi3ForCausalLM"

MODULES = {
    "o": "self_attn.o_proj",
    "qkv": "self_attn.qkv_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
    "attn_in": "input_layernorm",
    "mlp_in": "post_attention_layernorm",
}
KEYS = RopeKeys(partial="partial_rotary_factor", types=("default", "longrope"), original=4096)


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.optional("head_dim")
    sizes = read_sizes(
        reader,
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    window = read_window(reader, None)
    for factor in ("full_attn_mod", "interpolate_factor"):
        reader.only(factor, 1, None, remedy="transformers' Phi-3 does not read it")
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        reader.only(bias, False, None, remedy="transformers' Phi-3 has no biases")
    rope, scale = one_rope(reader, sizes, KEYS), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "phi3",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale, window),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-5, open_low=True)),
            "names": Names(modules=MODULES),
            "qkv": "slices",
            "restart_after": rope.original_max_position_embeddings,
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=1, eos=32000, pad=32000),
        },
    )
