"""Import: a checked copy of a model as a plain HF directory, from an HF directory, the hub, or a GGUF file.

Every tensor is checked against the configuration for name and shape and against NaN and infinity, converted if asked,
and written; one tensor at a time is in memory. Whatever was read, widened, tied or ignored is in the report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smedjan.checkpoint.atomic import new_directory, refuse_existing
from smedjan.checkpoint.dtype import convert, first_nonfinite
from smedjan.checkpoint.gguf import open_gguf
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor, TensorSpec
from smedjan.checkpoint.safetensors import open_checkpoint
from smedjan.errors import CheckpointError, ConfigError, nearest
from smedjan.hf.export import complete_config, files_along, fill_directory, json_bytes, sha256_of_file
from smedjan.hf.gguf_tokenizer import tokenizer_from_gguf
from smedjan.hf.tokenizer import load_tokenizer
from smedjan.models import llama
from smedjan.models.config import read_json_object
from smedjan.models.registry import ARCHITECTURES, read_config

DTYPES = ("float32", "bfloat16", "float16")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "tokenizer.model", "LICENSE*"]
# Other layouts of the same weights, which would only be downloaded.
_HUB_IGNORED = ["*/*.safetensors", "consolidated*"]
# Positions are computed from the config; checkpoints of transformers before 4.33 carry them too.
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import read and wrote. `parameters` counts elements, a tied head once; files are relative to `out`."""

    model_type: str
    parameters: int
    dtype: str
    source_quantization: dict[str, int] | None
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    tied: dict[str, str]
    files: tuple[dict[str, str], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as it lies there: `config` is a config.json, `file` where it stands."""

    config: dict[str, Any]
    file: Path
    tensors: LazyTensors
    files_from: Path | None
    extra_files: dict[str, bytes]
    quantization: dict[str, int] | None
    notes: list[str]


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    ignore_keys: Iterable[str] = (),
    progress: Progress | None = None,
) -> ImportReport:
    """Write the model `source` (an HF directory, a `.gguf` file, or a hub id) to the new directory `out`.

    `dtype` None keeps the stored one (GGUF: float32). `ignore_keys` names keys of the config to let pass.
    """
    if dtype is not None and dtype not in DTYPES:
        close = nearest(dtype, DTYPES)
        hint = f"did you mean {close!r}? " if close else ""
        raise ConfigError(f"is {dtype!r}", field="dtype", remedy=f"{hint}supported: {', '.join(DTYPES)}")
    out, ignored = Path(out), tuple(ignore_keys)
    refuse_existing(out)
    read = read_source(source, ignored)
    config = read_config(read.config, read.file, ignored)
    shapes = ARCHITECTURES[config.model_type].parameter_shapes(config)
    tied = ARCHITECTURES[config.model_type].tied(config)
    tensors, unexpected = match_tensors(read, shapes, tied)
    stored = _stored_dtype(tensors, read, dtype)
    target = dtype or stored
    _note_dtypes(read, stored, target)
    read.notes.extend(f"ignored the key {key}, as asked" for key in ignored)
    complete = complete_config(read.config, read.file, target, ignored)
    with new_directory(out) as partial_out:
        fill_directory(
            partial_out,
            complete,
            _checked(tensors, target, progress),
            files_from=read.files_from,
            extra_files=read.extra_files,
        )
        read.notes.extend(_check_tokenizer(read.files_from or partial_out, config.vocab_size))
        written = sorted(path for path in partial_out.rglob("*") if path.is_file())
        files = tuple(
            {"path": path.relative_to(partial_out).as_posix(), "sha256": sha256_of_file(path)} for path in written
        )
    return ImportReport(
        model_type=config.model_type,
        parameters=sum(entry.spec.numel for entry in tensors.entries.values()),
        dtype=target,
        source_quantization=read.quantization,
        missing=(),
        unexpected=unexpected,
        tied=tied,
        files=files,
        notes=tuple(read.notes),
    )


def read_source(source: str | Path, ignore_keys: tuple[str, ...]) -> Source:
    """The model at `source`, its tensors not yet read."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                "is neither a model directory nor a .gguf file",
                file=path,
                remedy="give the directory that holds config.json",
            )
        return _read_gguf(path, ignore_keys)
    if not path.exists():
        path = _download(str(source))
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError("is missing", file=file, remedy=_instead_of_config(path))
    return Source(
        config=read_json_object(file),
        file=file,
        tensors=open_checkpoint(path),
        files_from=path,
        extra_files={},
        quantization=None,
        notes=[],
    )


def _instead_of_config(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "this is a PEFT adapter: import its base model, then use smedjan merge"
    found = sorted(path.glob("*.gguf"))
    return f"give the file itself: {found[0]}" if found else "give a directory in Hugging Face's layout"


def _read_gguf(path: Path, ignore_keys: tuple[str, ...]) -> Source:
    model = open_gguf(path, ignore_keys)
    tokenizer = tokenizer_from_gguf(model.metadata, path)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(model.quantization.items()))
    return Source(
        config=llama.write(model.config),
        file=path,
        tensors=model.tensors,
        files_from=None,
        extra_files={**tokenizer.files, "generation_config.json": json_bytes(model.generation_config)},
        quantization=model.quantization,
        notes=[f"dequantized from GGUF ({kinds})", *model.notes, *tokenizer.notes],
    )


def _download(name: str) -> Path:
    """A snapshot of a hub repository: weights and data files, never code."""
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            "there is no such file or directory", file=name, remedy="check the path, or give org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except (HfHubHTTPError, HFValidationError, OSError) as cause:
        reason = str(cause).strip().partition("\n")[0]
        raise CheckpointError(
            f"there is no such directory, and the hub does not give it: {reason}",
            file=name,
            remedy="check the name and the connection, or give a directory",
        ) from cause


def match_tensors(
    read: Source, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]
) -> tuple[LazyTensors, tuple[str, ...]]:
    """The source's tensors in the model's order, and the ones ignored; a difference is a CheckpointError."""
    entries = read.tensors.entries
    buffers = tuple(name for name in entries if _BUFFERS.fullmatch(name))
    if buffers:
        read.notes.append(f"ignored {len(buffers)} rotary position buffers ({buffers[0]}): the config gives them")
    folder = next(iter(entries.values())).file.parent if entries else read.file
    missing = [name for name in shapes if name not in entries]
    if missing:
        remedy = "download the weights again, or correct config.json"
        if missing == [llama.HEAD]:
            remedy = "if the head is the embedding, set tie_word_embeddings to true"
        raise CheckpointError(_listed("the tensor is missing", missing), file=folder, field=missing[0], remedy=remedy)
    extra = [name for name in entries if name not in shapes and name not in tied and name not in buffers]
    if extra:
        close = nearest(extra[0], set(shapes))
        hint = f"the nearest that it has is {close}; " if close else ""
        raise CheckpointError(
            _listed("the model of this config has no such tensor", extra),
            file=entries[extra[0]].file,
            field=extra[0],
            remedy=f"{hint}correct config.json, or drop the tensor",
        )
    for name, shape in {**shapes, **{alias: shapes[name] for alias, name in tied.items()}}.items():
        if name not in entries:
            continue
        spec, file = entries[name].spec, entries[name].file
        if spec.shape != shape:
            raise CheckpointError(
                f"has shape {list(spec.shape)}, {read.file.name} says {list(shape)}",
                file=file,
                field=name,
                remedy="correct config.json, or get the weights that belong to it",
            )
        if spec.dtype not in (*DTYPES, "float64"):
            raise CheckpointError(
                f"is stored as {spec.dtype}", file=file, field=name, remedy="import the unquantized model"
            )
    _check_tied(read, tied)
    return LazyTensors({name: entries[name] for name in shapes}), buffers


def _listed(message: str, names: list[str]) -> str:
    return message if len(names) == 1 else f"{message} (and {len(names) - 1} more)"


def _check_tied(read: Source, tied: Mapping[str, str]) -> None:
    for alias, name in tied.items():
        if alias not in read.tensors:
            continue
        left, right = read.tensors[alias], read.tensors[name]
        if left.dtype != right.dtype or left.data != right.data:
            raise CheckpointError(
                f"differs from {name}, to which tie_word_embeddings ties it",
                file=read.tensors.entries[alias].file,
                field=alias,
                remedy="set tie_word_embeddings to false in config.json",
            )
        read.notes.append(f"dropped {alias}: it is {name}, bit for bit, and tied to it")


def _stored_dtype(tensors: LazyTensors, read: Source, dtype: str | None) -> str:
    counts = Counter(entry.spec.dtype for entry in tensors.entries.values())
    if dtype is None and (len(counts) > 1 or "float64" in counts):
        found = ", ".join(f"{count} in {name}" for name, count in counts.most_common())
        raise CheckpointError(
            f"tensors are stored {found}", file=read.file.parent, field="dtype", remedy="choose one with --dtype"
        )
    return counts.most_common(1)[0][0]


def _note_dtypes(read: Source, stored: str, target: str) -> None:
    declared = read.config.get("dtype", read.config.get("torch_dtype"))
    if isinstance(declared, str) and declared != stored:
        read.notes.append(f"config.json says {declared}, the tensors are {stored}")
    if stored != target:
        read.notes.append(f"converted from {stored} to {target}")


def _checked(tensors: LazyTensors, dtype: str, progress: Progress | None) -> LazyTensors:
    """The same tensors, finite and in `dtype` when read."""
    total = sum(entry.spec.nbytes for entry in tensors.entries.values())
    done = 0

    def load(name: str, entry: LazyTensor) -> RawTensor:
        nonlocal done
        tensor = entry.load()
        if (at := first_nonfinite(tensor)) is not None:
            raise CheckpointError(
                f"holds NaN or infinity (element {at})", file=entry.file, field=name, remedy="get sound weights"
            )
        converted = convert(tensor, dtype)
        if converted is not tensor and (at := first_nonfinite(converted)) is not None:
            raise CheckpointError(
                f"element {at} is beyond the range of {dtype}", file=entry.file, field=name, remedy="use bfloat16"
            )
        done += entry.spec.nbytes
        if progress is not None:
            progress(done, total)
        return converted

    return LazyTensors(
        {
            name: replace(entry, spec=TensorSpec(dtype=dtype, shape=entry.spec.shape), load=partial(load, name, entry))
            for name, entry in tensors.entries.items()
        }
    )


def _check_tokenizer(directory: Path, vocab_size: int) -> list[str]:
    if not (directory / "tokenizer.json").is_file():
        others = [path.name for path in files_along(directory) if path.name in ("tokenizer.model", "vocab.json")]
        also = f", only {others[0]}" if others else ""
        return [f"there is no tokenizer.json{also}: text cannot be encoded before one is added"]
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > vocab_size:
        return [f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size} embeddings"]
    return []
