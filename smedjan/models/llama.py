"""`model_type: llama` (Llama 1 to 3, SmolLM, TinyLlama, ...): its configuration, parameters and their shapes.

Names, layouts and defaults are those of transformers' `LlamaForCausalLM`. V vocab_size, H hidden_size, I
intermediate_size, A attention heads, K key/value heads, D head_dim; linear weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smedjan.models.config import HF_INERT, ConfigReader, RopeConfig, read_rope, write_rope

ARCHITECTURE = "LlamaForCausalLM"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What a Llama computes. Defaults are transformers' `LlamaConfig` ones (a 7B Llama 2)."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    rope: RopeConfig = field(default_factory=RopeConfig)
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int | None = None


def read(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> LlamaConfig:
    """`config.json` as a LlamaConfig; an unknown key, a value out of range or a contradiction is a ConfigError."""
    reader = ConfigReader(data, file, ignore_keys)
    reader.inert(*HF_INERT)
    vocab_size = reader.integer("vocab_size", 32000, low=1)
    hidden_size = reader.integer("hidden_size", 4096, low=1)
    heads = reader.integer("num_attention_heads", 32, low=1)
    kv_heads = reader.optional_integer("num_key_value_heads", low=1) or heads
    if heads % kv_heads:
        raise reader.contradiction(
            "num_attention_heads",
            "num_key_value_heads",
            f"are {heads} and {kv_heads}",
            "the second divides the first",
        )
    head_dim = _head_dim(reader, hidden_size, heads)
    max_position_embeddings = reader.integer("max_position_embeddings", 2048, low=1)
    dropout = 0.0
    if reader.has("attention_dropout"):
        dropout = reader.number("attention_dropout", 0.0)
    reader.inert("attention_dropout")
    if dropout:
        raise reader.error(f"is {dropout:g}, which is not supported", "attention_dropout", "set it to 0.0")
    halves = "smedjan rotates half-split pairs, as transformers does"
    reader.only("rope_interleaved", False, None, remedy=halves)
    reader.only("rope_traditional", False, None, remedy=halves)
    reader.only("sliding_window", None, remedy="a Llama attends to the whole context")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size", 11008, low=1),
        num_hidden_layers=reader.integer("num_hidden_layers", 32, low=1),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=reader.choice("hidden_act", ("silu",), "silu"),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6, open_low=True),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=reader.flag("attention_bias", False),
        mlp_bias=reader.flag("mlp_bias", False),
        attention_dropout=dropout,
        rope=read_rope(reader, max_position_embeddings),
        bos_token_id=_token_id(reader, "bos_token_id", 1, vocab_size),
        eos_token_id=_token_ids(reader, "eos_token_id", 2, vocab_size),
        pad_token_id=_token_id(reader, "pad_token_id", None, vocab_size),
    )
    reader.finish()
    return config


def _head_dim(reader: ConfigReader, hidden_size: int, heads: int) -> int:
    head_dim = reader.optional_integer("head_dim", low=1)
    # transformers refuses such a configuration even where head_dim is given, so that nothing could read what we save.
    if hidden_size % heads:
        raise reader.contradiction(
            "hidden_size",
            "num_attention_heads",
            f"are {hidden_size} and {heads}",
            "hidden_size must be a multiple of num_attention_heads",
        )
    head_dim = head_dim or hidden_size // heads
    if head_dim % 2:
        raise reader.error(
            f"is {head_dim} and rotary positions turn pairs",
            "head_dim" if reader.has("head_dim") else "hidden_size / num_attention_heads",
            "it must be even",
        )
    return head_dim


def _token_id(reader: ConfigReader, name: str, default: int | None, vocab_size: int) -> int | None:
    if name not in reader.data:
        reader.inert(name)
        return default
    return reader.optional_integer(name, high=vocab_size - 1)


def _token_ids(reader: ConfigReader, name: str, default: int, vocab_size: int) -> tuple[int, ...]:
    value = reader.data.get(name)
    if not isinstance(value, list):
        one = _token_id(reader, name, default, vocab_size)
        return () if one is None else (one,)
    reader.inert(name)
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
            raise reader.error(f"holds {item!r}", name, f"give ids between 0 and {vocab_size - 1}")
    return tuple(value)


def write(config: LlamaConfig) -> dict[str, Any]:
    """The keys of `config.json`, complete, since readers have other defaults (mlx-lm ties the head by default)."""
    eos = config.eos_token_id
    return {
        "architectures": [ARCHITECTURE],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": config.attention_dropout,
        **write_rope(config.rope),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
        "pad_token_id": config.pad_token_id,
    }


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter and its shape, in the order of transformers' `named_parameters()`; a tied head is not one."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}

    def linear(name: str, out_width: int, in_width: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out_width, in_width)
        if bias:
            shapes[f"{name}.bias"] = (out_width,)

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        linear(f"{prefix}.self_attn.q_proj", q_width, hidden, config.attention_bias)
        linear(f"{prefix}.self_attn.k_proj", kv_width, hidden, config.attention_bias)
        linear(f"{prefix}.self_attn.v_proj", kv_width, hidden, config.attention_bias)
        linear(f"{prefix}.self_attn.o_proj", hidden, q_width, config.attention_bias)
        linear(f"{prefix}.mlp.gate_proj", inner, hidden, config.mlp_bias)
        linear(f"{prefix}.mlp.up_proj", inner, hidden, config.mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, inner, config.mlp_bias)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def tied(config: LlamaConfig) -> dict[str, str]:
    """Names that are another parameter under a second name: {name: parameter}."""
    return {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
