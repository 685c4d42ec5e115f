"""`model_type: gemma3_text`: Gemma 3, text: norms over heads, five local layers to a global one, two thetas."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.decoder_config import LLAMA_MODULES, DecoderConfig, Names, Norm
from smedjan.models.fields import (
    by_type,
    finish,
    read_activation,
    read_cap,
    read_dropout,
    read_every_nth,
    read_pattern,
    read_sizes,
    read_tokens,
    read_window,
    start,
)
from smedjan.models.rope import RopeKeys, read_rope_of_each, write_rope_of_each

ARCHITECTURE = "Gemma3ForCausalLM"

MODULES = {
    **{role: LLAMA_MODULES[role] for role in "qkvo"},
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    **{role: LLAMA_MODULES[role] for role in ("gate", "up", "down")},
    "attn_in": "input_layernorm",
    "attn_out": "post_attention_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}
KEYS = RopeKeys(default_theta=1_000_000.0)
LOCAL = ("rope_local_base_freq", 10_000.0)


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=262208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        max_position_embeddings=131072,
        num_key_value_heads=4,
        head_dim=256,
        whole_heads=True,
    )
    count, window = sizes["num_hidden_layers"], read_window(reader, 4096)
    default = read_every_nth(reader, count, 6)
    reader.inert("_sliding_window_pattern", "cache_implementation")
    types = read_pattern(reader, count, default, window=window)
    ropes = read_rope_of_each(
        reader,
        head_dim=sizes["head_dim"],
        max_positions=sizes["max_position_embeddings"],
        keys=KEYS,
        local_theta=LOCAL,
    )
    reader.values.update(write_rope_of_each(ropes, KEYS, LOCAL))
    reader.inert("attn_logit_softcapping")  # read by transformers, and not computed
    scale = reader.integer("query_pre_attn_scalar", 256, low=1) ** -0.5
    return finish(
        reader,
        {
            "model_type": "gemma3_text",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "gelu_pytorch_tanh", "hidden_activation"),
            "layers": by_type(types, ropes, scale, window),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True), weight_cast="after", offset=1.0),
            "names": Names(modules=MODULES),
            "biases": frozenset("qkvo" if reader.flag("attention_bias", False) else ""),
            "qk_norm": "head",
            "embedding_scale": sizes["hidden_size"] ** 0.5,
            "round_embedding_scale": True,
            "logit_cap": read_cap(reader, "final_logit_softcapping", None),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=2, eos=1, pad=0),
        },
    )
