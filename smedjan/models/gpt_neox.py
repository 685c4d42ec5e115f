"""`model_type: gpt_neox`: Pythia, GPT-NeoX 20B: attention and MLP side by side, q, k and v fused head by head."""

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
    start,
    uniform,
)
from smedjan.models.rope import RopeKeys

ARCHITECTURE = "GPTNeoXForCausalLM"

NAMES = Names(
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    norm="gpt_neox.final_layer_norm",
    modules={
        "attn_in": "input_layernorm",
        "mlp_in": "post_attention_layernorm",
        "qkv": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
)
MLX_LM = (
    (r"model\.h\.", "gpt_neox.layers."),
    (r"model\.(embed_in|final_layer_norm)\.", r"gpt_neox.\1."),
    (r"(model\.)?embed_out\.", "lm_head."),
)
"""What mlx-lm calls them in what it writes; the last also for a quantised head's scales, under HF's name."""
KEYS = RopeKeys(theta="rotary_emb_base", partial="rotary_pct", default_partial=0.25)


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.optional("num_key_value_heads")
    reader.inert("attention_probs_dropout_prob", "hidden_dropout_prob")  # older names, which transformers does not read
    sizes = read_sizes(
        reader,
        vocab_size=50432,
        hidden_size=6144,
        intermediate_size=24576,
        num_hidden_layers=44,
        num_attention_heads=64,
        max_position_embeddings=2048,
        derived_head_dim=True,
        whole_heads=True,
    )
    reader.values.pop("num_key_value_heads")
    if sizes["num_key_value_heads"] != sizes["num_attention_heads"]:
        raise reader.error("is set", "num_key_value_heads", "remove it: GPT-NeoX has as many as attention heads")
    parallel = reader.flag("use_parallel_residual", True)
    attention = ("qkv", "o") if reader.flag("attention_bias", True) else ()
    reader.inert("rope_theta")
    rope, scale = one_rope(reader, sizes, KEYS), sizes["head_dim"] ** -0.5
    return finish(
        reader,
        {
            "model_type": "gpt_neox",
            "architecture": ARCHITECTURE,
            **sizes,
            "hidden_act": read_activation(reader, "gelu"),
            "layers": uniform(sizes["num_hidden_layers"], rope, scale),
            "norm": Norm(kind="layer_norm", eps=reader.number("layer_norm_eps", 1e-5, open_low=True), bias=True),
            "names": NAMES,
            "biases": frozenset((*attention, "up", "down")),
            "parallel": "mlp_first" if parallel else "",
            "qkv": "heads",
            "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
            "stored": (("lm_head.weight", "embed_out.weight"),),
            "accepted": MLX_LM,
            "buffers": r".*(rotary_emb\.inv_freq|attention\.(bias|masked_bias))",
            "dropout": read_dropout(reader, attention_dropout=0.0, hidden_dropout=0.0, classifier_dropout=0.1),
            **read_tokens(reader, sizes["vocab_size"], bos=0, eos=2, pad=None, padding=False),
        },
    )
