"""Calm little models of eleven families, of three layers: what parity and bisection are tried on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from smedjan.runtime.session import Session
from tests.families import make_model, make_session_of

_IDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_COMMON = {
    **_IDS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MIXED = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "head_dim": 8, "attention_bias": True},
    "mistral": {**_COMMON, "head_dim": 8, "sliding_window": 8},
    "gemma2": {**_COMMON, **_MIXED, "head_dim": 8, "query_pre_attn_scalar": 16},
    "granite": {**_COMMON, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "smollm3": {**_COMMON, "no_rope_layers": [1, 0, 1]},
    "olmo2": _COMMON,
    "cohere2": {**_COMMON, **_MIXED},
    "phi3": _COMMON,
    "stablelm": _COMMON,
    "gpt_neox": {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"},
    "gpt2": {**_IDS, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64},
}


def tiny(family: str, *, dtype: str = "float32", attention: str = "eager", **changes: Any) -> PreTrainedModel:
    return make_model(family, {**FAMILIES[family], **changes}, dtype=dtype, attention=attention, calm=True)


def session_of(
    model: PreTrainedModel, *, attention: str = "eager", on: str = "torch_reference", **changes: Any
) -> Session:
    """`changes` edit its config.json, for mutations."""
    return make_session_of(model, attention=attention, on=on, **changes)
