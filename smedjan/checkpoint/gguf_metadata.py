"""A model's configuration as GGUF metadata: what llama.cpp's loader asks for, by architecture."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_VERSION, LlamaFileType

from smedjan.checkpoint.gguf_arch import Architecture
from smedjan.checkpoint.gguf_rope import rope_keys, rope_tensors
from smedjan.checkpoint.gguf_write import MetadataValue
from smedjan.models.decoder_config import DecoderConfig
from smedjan.models.rope import RopeConfig


def model_metadata(
    config: DecoderConfig, architecture: Architecture, file_type: str, name: str
) -> dict[str, MetadataValue]:
    """`general.*` and the architecture's own keys."""
    keys: dict[str, MetadataValue] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        _EPS[config.norm.kind]: config.norm.eps,
        **_positions(config),
        **_windows(config, architecture),
        **_factors(config),
    }
    if config.model_type in ("gpt_neox", "stablelm"):
        keys["use_parallel_residual"] = bool(config.parallel)
    ftype = LlamaFileType.ALL_F32 if file_type == "F32" else LlamaFileType[f"MOSTLY_{file_type}"]
    return {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(ftype),
        "general.quantization_version": GGML_QUANT_VERSION,
        **{f"{architecture.name}.{key}": value for key, value in keys.items()},
    }


def extra_tensors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Tensors that are no parameters: the divisors of rotary positions."""
    rope = global_rope(config)
    return {} if rope is None else rope_tensors(rope, config.head_dim)


_EPS = {"rms_norm": "attention.layer_norm_rms_epsilon", "layer_norm": "attention.layer_norm_epsilon"}


def global_rope(config: DecoderConfig) -> RopeConfig | None:
    """Of the layers that see everything, where they have one; else of the others."""
    ropes = [layer.rope for layer in config.layers if layer.window is None and layer.rope is not None]
    return next(iter(ropes), None) or next((layer.rope for layer in config.layers if layer.rope is not None), None)


def _positions(config: DecoderConfig) -> dict[str, MetadataValue]:
    rope = global_rope(config)
    if rope is None:
        return {}
    keys: dict[str, MetadataValue] = {
        "rope.dimension_count": rope.rotary_dim(config.head_dim),
        "rope.freq_base": rope.rope_theta,
        **rope_keys(rope),
    }
    local = next((layer.rope for layer in config.layers if layer.window is not None and layer.rope is not None), None)
    if config.model_type == "gemma3_text" and local is not None:
        keys["rope.freq_base_swa"] = local.rope_theta
    return keys


def _windows(config: DecoderConfig, architecture: Architecture) -> dict[str, MetadataValue]:
    """Where llama.cpp has no window, the keys are for who reads the file back."""
    local = [layer.window is not None for layer in config.layers]
    if config.window is None:
        return {}
    keys: dict[str, MetadataValue] = {"attention.sliding_window": config.window}
    if architecture.windows or not all(local) or config.model_type == "ministral":
        keys["attention.sliding_window_pattern"] = np.array(local, np.bool_)
    return keys


def _factors(config: DecoderConfig) -> dict[str, MetadataValue]:
    keys: dict[str, MetadataValue] = {}
    if config.model_type == "granite":
        keys["attention.scale"] = config.layers[0].scale
        keys["embedding_scale"] = config.embedding_scale
        keys["residual_scale"] = config.residual_scale
        keys["logit_scale"] = config.logit_divisor
    if config.model_type in ("cohere", "cohere2"):
        keys["logit_scale"] = config.logit_scale
    if config.attention_cap:
        keys["attn_logit_softcapping"] = config.attention_cap
    if config.logit_cap:
        keys["final_logit_softcapping"] = config.logit_cap
    return keys
