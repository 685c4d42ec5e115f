"""Tiny random models of several families in transformers, and exact sessions over copies of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from smedjan.models.registry import read_config
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session

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
    """Every weight random. inv_freq stays float32, as from_pretrained keeps it."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    model = model.to(getattr(torch, dtype))
    for name, buffer in kept.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, buffer)
    return model


def exact(model: PreTrainedModel, *, attention: str = "eager", **changes: Any) -> Session:
    """`changes` edit its config.json, for mutations."""
    data = {**model.config.to_dict(), "architectures": [type(model).__name__], **changes}
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    dtype = str(model.dtype).removeprefix("torch.")
    config = read_config(data, Path("config.json"))
    return Session(backend("torch_reference"), config, parameters, dtype, attention=attention)


def on(session: Session, name: str) -> Session:
    """The same weights on a fast backend."""
    chosen = backend(name)
    arrays = {key: chosen.from_raw(session.backend.to_raw(array)) for key, array in session.parameters.items()}
    return Session(chosen, session.config, arrays, session.dtype, attention=session.attention)
