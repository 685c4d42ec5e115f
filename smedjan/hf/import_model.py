"""Import: a checked copy of a model as a plain HF directory, from an HF directory, the hub, or a GGUF file.

Every tensor is checked against the configuration for name and shape and against NaN and infinity, converted if asked,
hashed and written, in parts of about a million elements, so that a model of any size takes the same memory; the files
that are read are hashed beside it. Whatever was read, widened, tied or ignored is in the report.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from smedjan.checkpoint.atomic import new_directory, refuse_existing
from smedjan.checkpoint.digest import hashing, sha256_of_file, started
from smedjan.checkpoint.dtype import convert, first_nonfinite
from smedjan.checkpoint.gguf import open_gguf
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor, TensorSpec, specs_of
from smedjan.checkpoint.safetensors import INDEX, MAX_SHARD_BYTES, begins_like, open_checkpoint, plan_shards
from smedjan.checkpoint.sizes import parse_size, require_space
from smedjan.errors import CheckpointError, ConfigError, nearest
from smedjan.hf.beside import check_generation_config, check_tokenizer, instead_of_config, reading, require_readable
from smedjan.hf.export import complete_config, files_along, fill_directory, json_bytes
from smedjan.hf.gguf_tokenizer import tokenizer_from_gguf
from smedjan.hf.hub import Say, download, is_hub_id, published_sha256
from smedjan.hf.mlx_format import Quantization, joined, kinds, take_quantization
from smedjan.hf.tokenizer_convert import convert_tokenizer
from smedjan.models.config import read_json_object
from smedjan.models.decoder_config import DecoderConfig
from smedjan.models.registry import read_config

DTYPES = ("float32", "bfloat16", "float16")

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor, from whichever thread read it."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import read and wrote. `parameters` counts elements, a tied head once.

    `sources` are the files that were read, relative to where the model lies; `files` those in `out`: [{path, sha256}].
    """

    model_type: str
    parameters: int
    dtype: str
    source_quantization: dict[str, int] | None
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    tied: dict[str, str]
    sources: tuple[dict[str, str], ...]
    files: tuple[dict[str, str], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as it lies there: `config` is a config.json, `file` where it stands; `mlx` what mlx-lm added to it."""

    config: dict[str, Any]
    file: Path
    tensors: LazyTensors
    files_from: Path | None
    extra_files: dict[str, bytes]
    quantization: dict[str, int] | None
    notes: list[str]
    mlx: Quantization | None = None


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    ignore_keys: Iterable[str] = (),
    max_shard_size: int | str = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    say: Say = lambda line: None,
) -> ImportReport:
    """Write the model `source` (an HF directory, a `.gguf` file, or a hub id) to the new directory `out`.

    `dtype` None keeps the stored one (GGUF: float32). `ignore_keys` names keys of the config to let pass.
    `max_shard_size`: bytes, or "5GB", "200MB". `say` is told at once what the report's notes would tell too late.
    """
    if dtype is not None and dtype not in DTYPES:
        close = nearest(dtype, DTYPES)
        hint = f"did you mean {close!r}? " if close else ""
        raise ConfigError(f"is {dtype!r}", field="dtype", remedy=f"{hint}supported: {', '.join(DTYPES)}")
    out, ignored = Path(out), tuple(ignore_keys)
    max_shard_bytes = parse_size(max_shard_size, "max_shard_size")
    refuse_existing(out)
    read = read_source(source, ignored, say)
    config = read_config(read.config, read.file, ignored)
    tensors, unexpected = match_tensors(read, config)
    quantization = read.quantization
    if read.mlx is not None:
        quantization = kinds(tensors.entries)
        counted = ", ".join(f"{count} of {kind}" for kind, count in sorted(quantization.items()))
        read.notes.append(f"dequantized {counted}")
    stored = _stored_dtype(tensors, read, dtype)
    target = dtype or stored
    _note_dtypes(read, stored, target)
    read.notes.extend(f"ignored the key {key}, as asked" for key in ignored)
    asked = ", ".join(f"{key} {p:g}" for key, p in config.dropout.items())
    if asked:
        read.notes.append(f"config.json asks for dropout in training ({asked}): smedjan trains without it")
    _note_defaults(read, config)
    complete = complete_config(read.config, read.file, target, ignored)
    if read.files_from is not None:
        check_generation_config(read.files_from)
    made = {} if read.files_from is None else convert_tokenizer(read.files_from)
    if made:
        read.notes.append(f"made {', '.join(sorted(made))} of the older tokenizer files")
    checked = _checked(tensors, target, progress)
    require_space(out, sum(entry.spec.nbytes for entry in checked.entries.values()), "the model")
    copies = _copies(checked, max_shard_bytes)
    came_in = _files_of(read)
    hashed = [file for file in came_in if file not in copies]
    with new_directory(out) as partial_out, started(hashing(hashed)) as digests:
        written = fill_directory(
            partial_out,
            complete,
            checked,
            files_from=read.files_from,
            extra_files={**read.extra_files, **made},
            max_shard_bytes=max_shard_bytes,
        )
        # Where the source has tokenizer.json, an error is to name that one.
        described = partial_out if made or read.files_from is None else read.files_from
        read.notes.extend(check_tokenizer(described, config.vocab_size))
        paths = sorted(path for path in partial_out.rglob("*") if path.is_file())
        names = [path.relative_to(partial_out).as_posix() for path in paths]
        files = tuple(
            {"path": name, "sha256": written.get(name) or sha256_of_file(path)}
            for name, path in zip(names, paths, strict=True)
        )
        known = {file: written[name] for file, name in copies.items()}
        known.update(zip(hashed, digests(), strict=True))
        sources = _sources({file: known[file] for file in came_in}, read.file.parent)
    return ImportReport(
        model_type=config.model_type,
        parameters=sum(entry.spec.numel for entry in tensors.entries.values()),
        dtype=target,
        source_quantization=quantization,
        missing=(),
        unexpected=unexpected,
        tied=config.tied(),
        sources=sources,
        files=files,
        notes=tuple(read.notes),
    )


def read_source(source: str | Path, ignore_keys: tuple[str, ...], say: Say = lambda line: None) -> Source:
    """The model at `source`, its tensors not yet read. `say` is told what a download is about to cost."""
    path = Path(source)
    with reading(path):
        is_file, exists = path.is_file(), path.exists() or path.is_symlink()
    if is_file:
        if path.suffix != ".gguf":
            raise CheckpointError(
                "is neither a model directory nor a .gguf file",
                file=path,
                remedy="give the directory that holds config.json",
            )
        return _read_gguf(path, ignore_keys)
    notes = []
    if not exists:
        if not is_hub_id(str(source)):
            raise CheckpointError(
                "there is no such file or directory", file=path, remedy="check the path, or give org/name"
            )
        path = download(str(source), say)
        notes.append(f"{source} is commit {path.name}")
    require_readable(path)
    file = path / "config.json"
    if not file.is_file():
        raise instead_of_config(path)
    config, mlx = take_quantization(read_json_object(file), file)
    return Source(
        config=config,
        file=file,
        tensors=open_checkpoint(path),
        files_from=path,
        extra_files={},
        quantization=None,
        notes=notes,
        mlx=mlx,
    )


def _read_gguf(path: Path, ignore_keys: tuple[str, ...]) -> Source:
    model = open_gguf(path, ignore_keys)
    tokenizer = tokenizer_from_gguf(model.metadata, path)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(model.quantization.items()))
    return Source(
        config=model.config,
        file=path,
        tensors=model.tensors,
        files_from=None,
        extra_files={**tokenizer.files, "generation_config.json": json_bytes(model.generation_config)},
        quantization=model.quantization,
        notes=[f"dequantized from GGUF ({kinds})", *model.notes, *tokenizer.notes],
    )


def match_tensors(read: Source, config: DecoderConfig) -> tuple[LazyTensors, tuple[str, ...]]:
    """The source's tensors under the names of the model's parameters and in their order, and the names of the ones
    ignored; a difference is a CheckpointError."""
    shapes, tied = config.parameter_shapes(), config.tied()
    entries = _renamed(read, config, {*shapes, *tied})
    if read.mlx is not None:
        entries = joined(entries, read.mlx, config, read.file)
    # Positions and masks are computed from the config; older checkpoints carry them too.
    buffers = tuple(name for name in entries if re.fullmatch(config.buffers, name))
    if buffers:
        read.notes.append(f"ignored {len(buffers)} buffers ({buffers[0]}): the config gives them")
    folder = next(iter(entries.values())).file.parent if entries else read.file
    missing = [name for name in shapes if name not in entries]
    if missing:
        remedy = "download the weights again, or correct config.json"
        if missing == [f"{config.names.head}.weight"]:
            remedy = "if the head is the embedding, set tie_word_embeddings to true"
        field = dict(config.stored).get(missing[0], missing[0])
        raise CheckpointError(_listed("the tensor is missing", missing), file=folder, field=field, remedy=remedy)
    extra = [name for name in entries if name not in shapes and name not in tied and name not in buffers]
    if extra:
        close = nearest(extra[0], set(shapes))
        hint = f"the nearest that it has is {close}; " if close else ""
        raise CheckpointError(
            _listed("the model of this config has no such tensor", extra),
            file=entries[extra[0]].file,
            field=entries[extra[0]].name or extra[0],
            remedy=f"{hint}correct config.json, or drop the tensor",
        )
    for name, shape in {**shapes, **{alias: shapes[name] for alias, name in tied.items()}}.items():
        if name not in entries:
            continue
        spec, file, field = entries[name].spec, entries[name].file, entries[name].name or name
        if spec.shape != shape:
            raise CheckpointError(
                f"has shape {list(spec.shape)}, {read.file.name} says {list(shape)}",
                file=file,
                field=field,
                remedy="correct config.json, or get the weights that belong to it",
            )
        if spec.dtype not in (*DTYPES, "float64"):
            raise CheckpointError(
                f"is stored as {spec.dtype}", file=file, field=field, remedy="import the unquantized model"
            )
    _check_tied(read, entries, tied)
    return LazyTensors({name: entries[name] for name in shapes}), buffers


def _listed(message: str, names: list[str]) -> str:
    return message if len(names) == 1 else f"{message} (and {len(names) - 1} more)"


def _renamed(read: Source, config: DecoderConfig, known: set[str]) -> dict[str, LazyTensor]:
    """The source's tensors, each under its parameter's name where it has another one in checkpoints."""
    stored = {name: parameter for parameter, name in config.stored}
    entries: dict[str, LazyTensor] = {}
    for name, entry in read.tensors.entries.items():
        parameter = stored.get(name, name)
        if name not in known:
            parameter = config.parameter(parameter)
        if parameter in entries:
            raise CheckpointError(
                f"is there a second time, as {name}", file=entry.file, field=parameter, remedy="drop one of the two"
            )
        entries[parameter] = entry if parameter == name else replace(entry, name=name)
    return entries


def _check_tied(read: Source, entries: Mapping[str, LazyTensor], tied: Mapping[str, str]) -> None:
    for alias, name in tied.items():
        if alias not in entries:
            continue
        left, right = entries[alias].load(), entries[name].load()
        if left.dtype != right.dtype or not _same_bytes(left, right):
            raise CheckpointError(
                f"differs from {name}, to which tie_word_embeddings ties it",
                file=entries[alias].file,
                field=entries[alias].name or alias,
                remedy="set tie_word_embeddings to false in config.json",
            )
        read.notes.append(f"dropped {alias}: it is {name}, bit for bit, and tied to it")


def _same_bytes(left: RawTensor, right: RawTensor) -> bool:
    # Comparing views goes byte by byte in the interpreter, comparing copies of parts is memcmp.
    parts = zip(left.parts(), right.parts(), strict=True)
    return all(bytes(one.data) == bytes(other.data) for one, other in parts)


def _files_of(read: Source) -> list[Path]:
    """Every file that an import reads, the config first."""
    folder = read.files_from
    along = [] if folder is None else [folder / path for path in files_along(folder)]
    index = [] if folder is None or not (folder / INDEX).is_file() else [folder / INDEX]
    return list(dict.fromkeys([read.file, *index, *(entry.file for entry in read.tensors.entries.values()), *along]))


def _copies(tensors: LazyTensors, max_shard_bytes: int) -> dict[Path, str]:
    """Files of the source -> the file of weights that will be the same bytes, and so has the same sha256."""
    specs = specs_of(tensors)
    copies: dict[Path, str] = {}
    for shard, names in plan_shards(specs, max_shard_bytes).items():
        files = {tensors.entries[name].file for name in names}
        if len(files) == 1 and begins_like(file := files.pop(), {name: specs[name] for name in names}):
            copies[file] = shard
    return copies


def _sources(digests: Mapping[Path, str], folder: Path) -> tuple[dict[str, str], ...]:
    for file, digest in digests.items():
        published = published_sha256(file)
        if published not in (None, digest):
            raise CheckpointError(
                f"its sha256 is {digest}, the hub published {published}",
                file=file,
                remedy="delete the file that this link names and download it again",
            )
    return tuple({"path": file.relative_to(folder).as_posix(), "sha256": digest} for file, digest in digests.items())


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


def _note_defaults(read: Source, config: DecoderConfig) -> None:
    if config.defaults and read.files_from is not None:
        taken = ", ".join(f"{key} ({json.dumps(value)})" for key, value in config.defaults.items())
        read.notes.append(f"took the default of what {read.file.name} does not have: {taken}")


def _checked(tensors: LazyTensors, dtype: str, progress: Progress | None) -> LazyTensors:
    """The same tensors, finite and in `dtype` when read."""
    total = sum(entry.spec.nbytes for entry in tensors.entries.values())
    done, counting = 0, Lock()

    def stream(name: str, entry: LazyTensor) -> Iterator[RawTensor]:
        nonlocal done
        before = 0
        for part in entry.parts():
            if (at := first_nonfinite(part)) is not None:
                raise CheckpointError(
                    f"holds NaN or infinity (element {before + at})",
                    file=entry.file,
                    field=entry.name or name,
                    remedy="get sound weights",
                )
            converted = convert(part, dtype)
            if converted is not part and (at := first_nonfinite(converted)) is not None:
                raise CheckpointError(
                    f"element {before + at} is beyond the range of {dtype}",
                    file=entry.file,
                    field=entry.name or name,
                    remedy="use bfloat16",
                )
            yield converted
            before += part.numel
        with counting:
            done += entry.spec.nbytes
            if progress is not None:
                progress(done, total)

    return LazyTensors(
        {
            name: LazyTensor.of_parts(
                TensorSpec(dtype=dtype, shape=entry.spec.shape), entry.file, partial(stream, name, entry)
            )
            for name, entry in tensors.entries.items()
        }
    )
