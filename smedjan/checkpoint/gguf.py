"""The model in a GGUF file as an HF model: `config.json`, HF's names and layouts, values dequantized to float32."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.gguf_arch import ARCHITECTURES, Architecture
from smedjan.checkpoint.gguf_config import read_model_config, token_ids
from smedjan.checkpoint.gguf_file import GgufFile, GgufTensor, read_gguf
from smedjan.checkpoint.gguf_layout import Layout, layouts
from smedjan.checkpoint.gguf_rope import FREQS, LONG, SHORT
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor, TensorSpec
from smedjan.errors import CheckpointError, ConfigError
from smedjan.models.decoder_config import DecoderConfig, Shape

_ROTARY_BUFFER = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """`config` is complete; `quantization` counts tensors by their stored type; `notes` say what was assumed."""

    config: dict[str, Any]
    tensors: LazyTensors
    metadata: dict[str, Any]
    generation_config: dict[str, Any]
    quantization: dict[str, int]
    notes: tuple[str, ...]


def open_gguf(path: Path, ignore_keys: Iterable[str] = ()) -> GgufModel:
    """The model in `path`; its tensors are dequantized one at a time, when read."""
    file = read_gguf(path)
    architecture = _architecture(file)
    if file.metadata.get("split.count", 0) > 1:
        raise CheckpointError(
            "is one part of a split model", file=path, field="split.count", remedy="join it: llama-gguf-split --merge"
        )
    config = read_model_config(file, architecture, tuple(ignore_keys))
    generation = token_ids(file)
    return GgufModel(
        config=dict(config.data),
        tensors=_tensors(file, config, architecture),
        metadata=file.metadata,
        generation_config={key: value for key, value in generation.items() if value is not None},
        quantization=dict(Counter(tensor.quantization for tensor in file.tensors.values())),
        notes=tuple(_notes(config, architecture)),
    )


def _architecture(file: GgufFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(
            f"{name!r} is not supported",
            file=file.path,
            field="general.architecture",
            remedy=f"supported: {', '.join(sorted(ARCHITECTURES))}",
        )
    return ARCHITECTURES[name]


def _notes(config: DecoderConfig, architecture: Architecture) -> Iterable[str]:
    rope = next((layer.rope for layer in config.layers if layer.rope is not None), None)
    if rope is not None and rope.rope_type == "llama3":
        yield f"{FREQS} holds the divisors of Llama 3's scaling by {rope.factor:g}"
    if config.norm.offset:
        yield "the file holds 1 + w of each norm, rounded to float32: w is that less 1"
    if config.model_type != architecture.families[0]:
        yield f"a {architecture.name} file whose attention has windows: read as {config.model_type}"


def _load(tensor: GgufTensor, layout: Layout, index: int, shape: Shape) -> RawTensor:
    return RawTensor.of(np.ascontiguousarray(layout.unpack(tensor.dequantize(), index, shape), "<f4"))


def _tensors(file: GgufFile, config: DecoderConfig, architecture: Architecture) -> LazyTensors:
    shapes = config.parameter_shapes()
    planned = {layout.name: layout for layout in layouts(config, architecture)}
    entries: dict[str, LazyTensor] = {}
    for name, tensor in file.tensors.items():
        if name in (FREQS, LONG, SHORT) or _ROTARY_BUFFER.fullmatch(name):
            continue
        layout = planned.get(name)
        if layout is None:
            raise CheckpointError(
                f"is no tensor of a {config.model_type}",
                file=file.path,
                field=name,
                remedy=f"this model is not a plain {config.model_type}",
            )
        if layout.shape != tensor.shape:
            raise CheckpointError(
                f"has shape {list(tensor.shape)}, the metadata say {list(layout.shape)}",
                file=file.path,
                field=name,
                remedy="download the file again",
            )
        if name == "output.weight" and config.tie_word_embeddings:
            continue
        for index, parameter in enumerate(layout.parameters):
            shape = shapes[parameter]
            spec = TensorSpec(dtype="float32", shape=shape)
            load = partial(_load, tensor, layout, index, shape)
            entries[parameter] = LazyTensor(spec=spec, load=load, file=file.path)
    return LazyTensors({name: entries[name] for name in shapes if name in entries})
