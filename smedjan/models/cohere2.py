"""`model_type: cohere2`: Command R7B: attention and MLP side by side, interleaved rotation in local layers alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.cohere import MODULES, one_design
from smedjan.models.decoder_config import DecoderConfig, Layer, Names, Norm
from smedjan.models.fields import (
    finish,
    one_rope,
    read_activation,
    read_dropout,
    read_every_nth,
    read_pattern,
    read_sizes,
    read_tokens,
    read_window,
    start,
)

ARCHITECTURE = "Cohere2ForCausalLM"


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    sizes = read_sizes(
        reader,
        vocab_size=256000,
        hidden_size=8192,
        intermediate_size=22528,
        num_hidden_layers=40,
        num_attention_heads=64,
        max_position_embeddings=8192,
        derived_head_dim=True,
    )
    count, window = sizes["num_hidden_layers"], read_window(reader, 4096)
    default = read_every_nth(reader, count, 4)
    reader.inert("_sliding_window_pattern", "cache_implementation", "layer_switch")
    one_design(reader)
    reader.only("order_of_interleaved_layers", "local_attn_first", None, remedy="give layer_types")
    types = read_pattern(reader, count, default, window=window)
    reader.only("use_qk_norm", False, None, remedy="transformers' Cohere 2 has no such norms")
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "cohere2",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": tuple(
                Layer(rope=rope, scale=scale, window=window)
                if kind == "sliding_attention"
                else Layer(rope=None, scale=scale)
                for kind in types
            ),
            "norm": Norm(kind="layer_norm", eps=reader.number("layer_norm_eps", 1e-5, open_low=True), composed=True),
            "names": Names(modules=MODULES),
            "biases": frozenset("qkvo" if reader.flag("attention_bias", False) else ""),
            "parallel": "residual_first",
            "interleaved": True,
            "rope_upcast": "input",
            "logit_scale": reader.number("logit_scale", 0.0625, open_low=True),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=5, eos=255001, pad=0),
        },
    )
