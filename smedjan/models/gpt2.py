"""`model_type: gpt2`: GPT-2: learned positions, layer norms, [in, out] weights, q, k and v fused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan.models.config import ConfigReader
from smedjan.models.decoder_config import DecoderConfig, Layer, Names, Norm
from smedjan.models.fields import MAX_LAYERS, finish, read_activation, read_dropout, read_tokens, start

ARCHITECTURE = "GPT2LMHeadModel"

NAMES = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    norm="transformer.ln_f",
    modules={
        "attn_in": "ln_1",
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "mlp_in": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
)
SUMMARY = ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout")
"""Of the double-heads model: none enters this one."""


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
    reader = start(data, file, ignore_keys)
    reader.inert(*SUMMARY, "_num_labels")
    hidden, heads = _size(reader, "n_embd", "hidden_size", 768), _size(reader, "n_head", "num_attention_heads", 12)
    if hidden % heads:
        raise reader.contradiction("n_embd", "n_head", f"are {hidden} and {heads}", "n_embd is a multiple of n_head")
    count = _size(reader, "n_layer", "num_hidden_layers", 12, high=MAX_LAYERS)
    head_dim = hidden // heads
    positions = _size(reader, "n_positions", "max_position_embeddings", 1024)
    reader.only("n_ctx", positions, None, remedy=f"n_positions is {positions}: keep one")
    # Its older name, which mlx-lm reads alone.
    reader.values["n_ctx"] = positions
    scale = head_dim**-0.5 if reader.flag("scale_attn_weights", True) else 1.0
    by_layer = reader.flag("scale_attn_by_inverse_layer_idx", False)
    reader.only("reorder_and_upcast_attn", False, remedy="attention is computed in the model's dtype alone")
    vocab_size = reader.integer("vocab_size", 50257, low=1)
    return finish(
        reader,
        {
            "model_type": "gpt2",
            "architecture": ARCHITECTURE,
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "intermediate_size": reader.optional_integer("n_inner", low=1) or 4 * hidden,
            "num_hidden_layers": count,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": head_dim,
            "max_position_embeddings": positions,
            "hidden_act": read_activation(reader, "gelu_new", "activation_function"),
            "layers": tuple(
                Layer(rope=None, scale=scale / float(number + 1) if by_layer else scale) for number in range(count)
            ),
            "norm": Norm(kind="layer_norm", eps=reader.number("layer_norm_epsilon", 1e-5, open_low=True), bias=True),
            "names": NAMES,
            "biases": frozenset(("qkv", "o", "up", "down")),
            "qkv": "split",
            "conv1d": True,
            "softmax_dtype": "",
            "tie_word_embeddings": reader.flag("tie_word_embeddings", True),
            "accepted": ((r"(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
            "buffers": r".*attn\.(bias|masked_bias)",
            "dropout": read_dropout(reader, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
            **read_tokens(reader, vocab_size, bos=50256, eos=50256, pad=None, padding=False),
        },
    )


def _size(reader: ConfigReader, name: str, other: str, default: int, high: int | None = None) -> int:
    """GPT-2's own key, or the common one, which transformers takes for it."""
    if reader.has(other) and reader.has(name) and reader.data[other] != reader.data[name]:
        raise reader.contradiction(name, other, f"are {reader.data[name]} and {reader.data[other]}", "keep one")
    used = other if reader.has(other) else name
    value = reader.integer(used, default, low=1, high=high)
    reader.inert(name, other)
    reader.values.pop(other, None)
    reader.values[name] = value
    return value
