"""`model_type: cohere`: Command R: attention and MLP side by side, interleaved rotation in float32."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.config import ConfigReader
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

ARCHITECTURE = "CohereForCausalLM"

MODULES = {role: LLAMA_MODULES[role] for role in ("q", "k", "v", "o", "gate", "up", "down", "attn_in")}
KEYS = RopeKeys(default_theta=500_000.0)


def one_design(reader: ConfigReader) -> None:
    """Keys of Cohere's own code, for choices that transformers' models leave open to nobody."""
    reader.only("position_embedding_type", "rope_gptj", None, remedy="only interleaved rotation is supported")
    reader.only("rotary_pct", 1.0, 1, None, remedy="models of this type rotate the whole head")
    for name in ("use_gated_activation", "use_parallel_block", "use_embedding_sharing", "use_parallel_embedding"):
        reader.only(name, True, None, remedy="transformers' Cohere models have no other design")
    reader.inert("model_max_length")


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.optional("head_dim")
    sizes = read_sizes(
        reader,
        vocab_size=256000,
        hidden_size=8192,
        intermediate_size=22528,
        num_hidden_layers=40,
        num_attention_heads=64,
        max_position_embeddings=8192,
    )
    one_design(reader)
    reader.only("use_qk_norm", False, None, remedy="only models without norms over heads are supported")
    rope, scale = one_rope(reader, sizes, KEYS), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "cohere",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "silu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
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
