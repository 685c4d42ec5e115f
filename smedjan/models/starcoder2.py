"""`model_type: starcoder2`: StarCoder 2: layer norms, an MLP without a gate, biases, one sliding window."""

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
    read_window,
    start,
    uniform,
)

ARCHITECTURE = "Starcoder2ForCausalLM"

MODULES = {
    **{role: LLAMA_MODULES[role] for role in "qkvo"},
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
    "attn_in": "input_layernorm",
    "mlp_in": "post_attention_layernorm",
}


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.optional("head_dim")
    sizes = read_sizes(
        reader,
        vocab_size=49152,
        hidden_size=3072,
        intermediate_size=12288,
        num_hidden_layers=30,
        num_attention_heads=24,
        max_position_embeddings=4096,
        num_key_value_heads=2,
    )
    window = read_window(reader, None)
    rope, scale = one_rope(reader, sizes), sizes["head_dim"] ** -0.5
    # Of the code that it was trained with: second names, and what transformers does in any case.
    reader.inert("layer_norm_epsilon", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    reader.only("scale_attn_weights", True, None, remedy="scores are scaled by head_dim ** -0.5")
    reader.only("mlp_type", "default", remedy="transformers' StarCoder 2 has one kind of MLP")
    reader.only("norm_type", "layer_norm", remedy="transformers' StarCoder 2 has layer norms")
    return finish(
        reader,
        {
            "model_type": "starcoder2",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "gelu_pytorch_tanh"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale, window),
            "norm": Norm(kind="layer_norm", eps=reader.number("norm_epsilon", 1e-5, open_low=True), bias=True),
            "names": Names(modules=MODULES),
            "biases": frozenset(("q", "k", "v", "o", "up", "down") if reader.flag("use_bias", True) else ()),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
            "dropout": read_dropout(reader, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0),
            **read_tokens(reader, sizes["vocab_size"], bos=50256, eos=50256, pad=None),
        },
    )
