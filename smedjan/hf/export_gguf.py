"""Export: a model directory as one GGUF file for llama.cpp, and the Modelfile with which ollama takes it.

Tensors are read, laid out, encoded and written one at a time. What llama.cpp cannot compute is an error before anything
is written; what it leaves out is in the report's notes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.digest import sha256_of_file
from smedjan.checkpoint.dtype import convert, to_float32
from smedjan.checkpoint.gguf_arch import architecture_of
from smedjan.checkpoint.gguf_layout import Layout, layouts
from smedjan.checkpoint.gguf_metadata import extra_tensors, model_metadata
from smedjan.checkpoint.gguf_mixture import FILE_TYPES, is_seventy_billion, tensor_types
from smedjan.checkpoint.gguf_quantize import encode
from smedjan.checkpoint.gguf_write import OutTensor, gguf_size, write_gguf
from smedjan.checkpoint.raw import LazyTensors, RawTensor
from smedjan.checkpoint.sizes import require_space
from smedjan.errors import CheckpointError, ConfigError, nearest
from smedjan.hf.gguf_vocabulary import vocabulary_of
from smedjan.hf.hub import Say
from smedjan.hf.import_model import match_tensors, read_source
from smedjan.hf.tokenizer_classes import optional_json
from smedjan.models.registry import read_config

# generation_config.json's names -> those of ollama.
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote. `types` counts tensors by how they are stored; `files`: [{path, sha256}]."""

    out: Path
    model_type: str
    architecture: str
    type: str
    parameters: int
    bytes: int
    types: dict[str, int]
    files: tuple[dict[str, str], ...]
    notes: tuple[str, ...]


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    type: str = "Q4_K_M",
    ignore_keys: Iterable[str] = (),
    say: Say = lambda line: None,
) -> ExportReport:
    """Write the model directory (or hub id) `source` to the new file `out`, and OUT.Modelfile beside it."""
    if type not in FILE_TYPES:
        close = nearest(type, FILE_TYPES)
        hint = f"did you mean {close!r}? " if close else ""
        raise ConfigError(f"is {type!r}", field="type", remedy=f"{hint}supported: {', '.join(FILE_TYPES)}")
    out, ignored = Path(out), tuple(ignore_keys)
    modelfile = out.with_suffix(".Modelfile")
    for path in (out, modelfile):
        _refuse(path)
    if str(source).endswith(".gguf"):
        raise CheckpointError("is a GGUF file", file=source, remedy="import it first: smedjan import FILE DIR")
    read = read_source(source, ignored, say)
    assert read.files_from is not None
    config = read_config(read.config, read.file, ignored)
    architecture, notes = architecture_of(config, read.file)
    tensors, _ = match_tensors(read, config)
    vocabulary = vocabulary_of(read.files_from, config.vocab_size)
    planned = layouts(config, architecture)
    extras = extra_tensors(config)
    types = tensor_types(
        {layout.name: layout.shape for layout in planned},
        type,
        block_count=config.num_hidden_layers,
        seventy_billion=is_seventy_billion(
            architecture.name, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
        ),
    )
    metadata = {
        **model_metadata(config, architecture, type, read.files_from.resolve().name),
        **vocabulary.metadata,
    }
    written = [
        *(_out_tensor(layout, tensors, types[layout.name]) for layout in planned),
        *(_extra(name, values) for name, values in extras.items()),
    ]
    size = gguf_size(metadata, written)
    require_space(out, size, "the GGUF file")
    settings = optional_json(read.files_from / "generation_config.json")
    write_atomic(modelfile, _modelfile(out.name, vocabulary.stops, settings).encode())
    done = False
    try:
        write_gguf(out, metadata, written)
        done = True
    finally:
        if not done:
            modelfile.unlink()
    counts: dict[str, int] = {}
    for tensor in written:
        counts[tensor.quantization] = counts.get(tensor.quantization, 0) + 1
    return ExportReport(
        out=out,
        model_type=config.model_type,
        architecture=architecture.name,
        type=type,
        parameters=sum(entry.spec.numel for entry in tensors.entries.values()),
        bytes=size,
        types=counts,
        files=tuple({"path": path.name, "sha256": sha256_of_file(path)} for path in (out, modelfile)),
        notes=(*read.notes, *notes, *vocabulary.notes),
    )


def _refuse(path: Path) -> None:
    if path.exists() or path.is_symlink():
        what = "is a directory" if path.is_dir() else "exists"
        raise CheckpointError(what, file=path, remedy="give another name, or remove it first")


def _out_tensor(layout: Layout, tensors: LazyTensors, quantization: str) -> OutTensor:
    chunks: Callable[[], Iterable[np.ndarray]] = partial(_encoded, layout, tensors, quantization)
    return OutTensor(name=layout.name, quantization=quantization, shape=layout.shape, chunks=chunks)


def _encoded(layout: Layout, tensors: LazyTensors, quantization: str) -> Iterator[np.ndarray]:
    name = layout.parameters[0]
    file = tensors.entries[name].file
    yield from encode(_laid_out(layout, tensors), quantization, name=name, file=file)


_BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


def _laid_out(layout: Layout, tensors: Mapping[str, RawTensor]) -> RawTensor:
    """The tensor as the file has it, in the dtype of its parameters where only elements move."""
    parts = [tensors[name] for name in layout.parameters]
    dtype = parts[0].dtype
    if dtype not in _BITS:
        parts, dtype = [convert(part, "float32") for part in parts], "float32"
    if layout.kind == "copy":
        return parts[0]
    if layout.kind == "offset":
        return RawTensor.of(layout.pack([to_float32(part) for part in parts]))
    arrays = [np.frombuffer(part.data, _BITS[dtype]).reshape(part.shape) for part in parts]
    return RawTensor.of(layout.pack(arrays), dtype)


def _extra(name: str, values: np.ndarray) -> OutTensor:
    return OutTensor(name=name, quantization="F32", shape=values.shape, chunks=lambda: [values.view(np.uint8)])


def _modelfile(name: str, stops: Iterable[str], settings: Mapping[str, Any]) -> str:
    """What `ollama create NAME -f FILE` reads. The chat template is in the GGUF file, from which ollama takes it."""
    lines = [f"FROM ./{name}", *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops)]
    if settings.get("do_sample") is not False:
        for key, parameter in _SAMPLING.items():
            value = settings.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                lines.append(f"PARAMETER {parameter} {value:g}")
    return "\n".join(lines) + "\n"
