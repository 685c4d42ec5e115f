"""`model_type: smollm3`: SmolLM 3: each fourth layer without rotary positions, a window there where asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.decoder_config import DecoderConfig, Layer, Norm
from smedjan.models.fields import (
    finish,
    one_rope,
    read_activation,
    read_dropout,
    read_pattern,
    read_sizes,
    read_tokens,
    read_window,
    start,
)
from smedjan.models.rope import RopeKeys

ARCHITECTURE = "SmolLM3ForCausalLM"

KEYS = RopeKeys(default_theta=2_000_000.0)


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.optional("head_dim")
    sizes = read_sizes(
        reader,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        max_position_embeddings=32768,
        num_key_value_heads=4,
    )
    count, window = sizes["num_hidden_layers"], read_window(reader, None)
    if not reader.flag("use_sliding_window", False):
        window = None
    reader.inert("max_window_layers")  # Qwen's, and not read: layer_types has what it says
    interval = reader.integer("no_rope_layer_interval", 4, low=1)
    turned = reader.choices("no_rope_layers", (0, 1), count) or tuple(
        int((number + 1) % interval != 0) for number in range(count)
    )
    reader.values["no_rope_layers"] = list(turned)
    default = ["full_attention" if has_rope or window is None else "sliding_attention" for has_rope in turned]
    types = read_pattern(reader, count, default, window=window)
    attention_bias, mlp_bias = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    rope, scale = one_rope(reader, sizes, KEYS), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "smollm3",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": tuple(
                Layer(
                    rope=rope if has_rope else None,
                    scale=scale,
                    window=window if kind == "sliding_attention" else None,
                )
                for has_rope, kind in zip(turned, types, strict=True)
            ),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-6, open_low=True)),
            "biases": frozenset(("q", "k", "v", "o") * attention_bias + ("gate", "up", "down") * mlp_bias),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=128000, eos=128001, pad=128004),
        },
    )
