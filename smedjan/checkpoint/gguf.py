"""A Llama in a GGUF file as an HF model: `config.json`, HF's names and layouts, values dequantized to float32.

llama.cpp rotates neighbouring pairs, HF rotates halves: its converter interleaves the rows of each head of q and k,
(A, 2, D/2) -> (A, D/2, 2), and we undo that. Llama 3's long-context scaling is stored as a tensor of divisors,
`rope_freqs.weight`, from which we find its parameters again or refuse.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.gguf_file import GgufFile, GgufTensor, read_gguf
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor, TensorSpec
from smedjan.errors import CheckpointError, ConfigError
from smedjan.models import llama
from smedjan.models.config import ConfigReader, RopeConfig
from smedjan.models.llama import LlamaConfig

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_ROPE_FREQS = "rope_freqs.weight"
_ROTARY_BUFFER = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """`config` is complete; `quantization` counts tensors by their stored type; `notes` say what was assumed."""

    config: LlamaConfig
    tensors: LazyTensors
    metadata: dict[str, Any]
    generation_config: dict[str, Any]
    quantization: dict[str, int]
    notes: tuple[str, ...]


def open_gguf(path: Path, ignore_keys: Iterable[str] = ()) -> GgufModel:
    """The model in `path`; its tensors are dequantized one at a time, when read."""
    file = read_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{architecture!r} is not supported", file=path, field="general.architecture", remedy="supported: llama"
        )
    if file.metadata.get("split.count", 0) > 1:
        raise CheckpointError(
            "is one part of a split model", file=path, field="split.count", remedy="join it: llama-gguf-split --merge"
        )
    config = _config(file, tuple(ignore_keys))
    notes: tuple[str, ...] = ()
    if config.rope.rope_type == "llama3":
        notes = (f"{_ROPE_FREQS} holds the divisors of Llama 3's scaling by {config.rope.factor:g}",)
    eos = list(config.eos_token_id)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id,
    }
    return GgufModel(
        config=config,
        tensors=_tensors(file, config),
        metadata=file.metadata,
        generation_config={key: value for key, value in generation.items() if value not in (None, [])},
        quantization=dict(Counter(tensor.quantization for tensor in file.tensors.values())),
        notes=notes,
    )


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _config(file: GgufFile, ignore_keys: tuple[str, ...]) -> LlamaConfig:
    data = {key.removeprefix("llama."): value for key, value in file.metadata.items() if key.startswith("llama.")}
    reader = ConfigReader(data, file.path, [key.removeprefix("llama.") for key in ignore_keys], prefix="llama.")
    reader.inert("rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout")
    reader.only("expert_count", 0, remedy="mixtures of experts are not supported")
    reader.only("expert_used_count", 0, remedy="mixtures of experts are not supported")
    reader.only("rope.scaling.attn_factor", 1.0, remedy="only models without attention scaling are supported")
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(data.get(name), list):
            if len(set(data[name])) != 1:
                raise reader.error("differs between layers", name, "a Llama has one value for all")
            data[name] = data[name][0]
    hidden = reader.integer("embedding_length", low=1)
    heads = reader.integer("attention.head_count", low=1)
    kv_heads = reader.integer("attention.head_count_kv", heads, low=1)
    head_dim = reader.integer("attention.key_length", hidden // heads, low=1)
    for name in ("attention.value_length", "rope.dimension_count"):
        if reader.integer(name, head_dim) != head_dim:
            raise reader.error(f"is {data[name]}, heads have {head_dim}", name, "the two must be equal")
    context = reader.integer("context_length", low=1)
    theta = _decimal(reader.number("rope.freq_base", 10000.0, open_low=True))
    ids = _token_ids(file)
    config = LlamaConfig(
        vocab_size=reader.integer("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())), low=1),
        hidden_size=hidden,
        intermediate_size=reader.integer("feed_forward_length", low=1),
        num_hidden_layers=reader.integer("block_count", low=1),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=_decimal(reader.number("attention.layer_norm_rms_epsilon", open_low=True)),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        rope=_rope(reader, file, head_dim, theta),
        **ids,
    )
    reader.finish()
    # Once more through the strict reader: heads that contradict each other, token ids beyond the vocabulary.
    return llama.read(llama.write(config), file.path)


def _token_ids(file: GgufFile) -> dict[str, Any]:
    reader = ConfigReader(file.metadata, file.path)
    eos = [reader.optional_integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "bos_token_id": reader.optional_integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": tuple(dict.fromkeys(token for token in eos if token is not None)),
        "pad_token_id": reader.optional_integer("tokenizer.ggml.padding_token_id"),
    }


def _rope(reader: ConfigReader, file: GgufFile, head_dim: int, theta: float) -> RopeConfig:
    kind = reader.choice("rope.scaling.type", ("none", "linear"), "none")
    factor = _decimal(reader.number("rope.scaling.factor", 1.0))
    # What llama.cpp wrote for `linear` before it had a type.
    legacy = _decimal(reader.number("rope.scale_linear", 1.0, open_low=True))
    divisors = file.tensors.get(_ROPE_FREQS)
    if divisors is not None:
        rope = _llama3(divisors.dequantize().ravel(), head_dim, theta)
        if rope is None or kind == "linear" or legacy != 1.0:
            raise CheckpointError(
                "its divisors are not those of Llama 3.1 to 3.3",
                file=file.path,
                field=_ROPE_FREQS,
                remedy="import the model's safetensors instead, whose config.json says how it scales",
            )
        return rope
    factor = factor if kind == "linear" else legacy
    if factor in (0.0, 1.0):
        return RopeConfig(rope_theta=theta)
    return RopeConfig(rope_type="linear", rope_theta=theta, factor=factor)


def llama3_divisors(
    theta: float, head_dim: int, factor: float, *, original: int = 8192, low: float = 1.0, high: float = 4.0
) -> np.ndarray:
    """What `rope_freqs.weight` holds for a llama3 scaling: the divisor of each inverse frequency, float32 [D / 2]."""
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def _llama3(divisors: np.ndarray, head_dim: int, theta: float) -> RopeConfig | None:
    """The llama3 scaling with these divisors, among those that Meta's models have: the factor is the largest."""
    if divisors.shape != (head_dim // 2,) or not divisors.max() > 1:
        return None
    factor = _decimal(float(divisors.max()))
    # The converter computes in float32: a few ulps apart, while another parameter moves a divisor by percents.
    if not np.allclose(divisors, llama3_divisors(theta, head_dim, factor), rtol=1e-4, atol=0):
        return None
    return RopeConfig(
        rope_type="llama3",
        rope_theta=theta,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def _hf_name(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found and found[2] in _LAYER:
        return f"model.layers.{found[1]}.{_LAYER[found[2]]}.{kind}"
    return None


def _load(tensor: GgufTensor, heads: int | None) -> RawTensor:
    values = tensor.dequantize()
    if heads is not None:
        halves = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    return RawTensor.of(np.ascontiguousarray(values, "<f4"))


def _tensors(file: GgufFile, config: LlamaConfig) -> LazyTensors:
    shapes = llama.parameter_shapes(config)
    entries: dict[str, LazyTensor] = {}
    for name, tensor in file.tensors.items():
        if name == _ROPE_FREQS or _ROTARY_BUFFER.fullmatch(name):
            continue
        target = _hf_name(name)
        if target is None:
            raise CheckpointError(
                "is no tensor of a Llama", file=file.path, field=name, remedy="this model is not a plain Llama"
            )
        if shapes.get(target, tensor.shape) != tensor.shape:
            raise CheckpointError(
                f"has shape {list(tensor.shape)}, the metadata say {list(shapes[target])}",
                file=file.path,
                field=name,
                remedy="download the file again",
            )
        heads = None
        if ".attn_q." in name:
            heads = config.num_attention_heads
        elif ".attn_k." in name:
            heads = config.num_key_value_heads
        spec = TensorSpec(dtype="float32", shape=tensor.shape)
        entries[target] = LazyTensor(spec=spec, load=partial(_load, tensor, heads), file=file.path)
    ordered = [name for name in shapes if name in entries] + [name for name in entries if name not in shapes]
    return LazyTensors({name: entries[name] for name in ordered})
