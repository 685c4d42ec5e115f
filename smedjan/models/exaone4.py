"""`model_type: exaone4`: EXAONE 4: norms behind each part and over heads; global layers without positions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from smedjan.models.olmo2 import MODULES

ARCHITECTURE = "Exaone4ForCausalLM"


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.optional("head_dim")
    sizes = read_sizes(
        reader,
        vocab_size=102400,
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        num_key_value_heads=32,
    )
    count, window = sizes["num_hidden_layers"], read_window(reader, 4096)
    if reader.has("layer_types"):
        reader.inert("sliding_window_pattern")  # "LLLG", or a number: said again by layer_types
        default = ["full_attention"] * count
    elif window is None:
        reader.inert("sliding_window_pattern")
        default = ["full_attention"] * count
    else:
        default = read_every_nth(reader, count, 4)
    types = read_pattern(reader, count, default, window=window)
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "exaone4",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": tuple(
                Layer(rope=rope, scale=scale, window=window)
                if kind == "sliding_attention"
                else Layer(rope=rope if window is None else None, scale=scale)
                for kind in types
            ),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-5, open_low=True)),
            "names": Names(modules=MODULES),
            "qk_norm": "head",
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=0, eos=2, pad=None),
        },
    )
