"""`model_type: olmo3`: OLMo 3: OLMo 2 with three local layers to a global one, whose positions alone are scaled."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.decoder_config import DecoderConfig, Names, Norm
from smedjan.models.fields import (
    by_type,
    every_nth,
    finish,
    read_activation,
    read_dropout,
    read_pattern,
    read_sizes,
    read_tokens,
    read_window,
    start,
)
from smedjan.models.olmo2 import MODULES
from smedjan.models.rope import RopeKeys, read_rope_of_each, write_rope_of_each

ARCHITECTURE = "Olmo3ForCausalLM"

KEYS = RopeKeys(default_theta=500_000.0)
LOCAL = (None, 500_000.0)


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.optional("head_dim")
    sizes = read_sizes(
        reader,
        vocab_size=50304,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
    )
    count, window = sizes["num_hidden_layers"], read_window(reader, 4096)
    types = read_pattern(reader, count, every_nth(count, 4), window=window)
    ropes = read_rope_of_each(
        reader,
        head_dim=sizes["head_dim"],
        max_positions=sizes["max_position_embeddings"],
        keys=KEYS,
        local_theta=LOCAL,
    )
    reader.values.update(write_rope_of_each(ropes, KEYS, LOCAL))
    scale = sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "olmo3",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": by_type(types, ropes, scale, window),
            "norm": Norm(eps=reader.number("rms_norm_eps", 1e-5, open_low=True), weight_cast="after"),
            "names": Names(modules=MODULES),
            "biases": frozenset("qkvo" if reader.flag("attention_bias", False) else ""),
            "qk_norm": "flat",
            "rope_dtype": "float32",
            "rope_upcast": "terms",
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "dropout": read_dropout(reader, attention_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=None, eos=50279, pad=1),
        },
    )
