"""A model directory that transformers, mlx-lm and everything else in HF's world loads unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smedjan.checkpoint.atomic import new_directory, write_atomic, write_errors
from smedjan.checkpoint.raw import LazyTensors, RawTensor, specs_of
from smedjan.checkpoint.safetensors import MAX_SHARD_BYTES, save_sharded
from smedjan.hf.beside import reading
from smedjan.models.decoder_config import DecoderConfig
from smedjan.models.registry import read_config

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What goes along with the weights: the tokenizer, its chat template, and how to generate."""

ALONG = (*TOKENIZER_FILES, "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
# Code, a path on the machine that saved it, and the older name of `dtype`.
_DROPPED = ("auto_map", "_name_or_path", "name_or_path", "torch_dtype")


def complete_config(data: Mapping[str, Any], file: Path, dtype: str, ignore_keys: Iterable[str] = ()) -> dict[str, Any]:
    """`config.json` to write: what was read, with every key that matters spelt out, RoPE in both spellings.

    Keys let through by `ignore_keys` are dropped, so that the result reads strictly.
    """
    ignored = tuple(ignore_keys)
    config = read_config(dict(data), file, ignored)
    written = config.data
    dropped = {*_DROPPED, *ignored} - set(written)
    kept = {key: value for key, value in data.items() if key not in dropped}
    return {**kept, **written, "dtype": dtype}


def files_along(source: Path) -> list[Path]:
    """The tokenizer, generation and licence files of a model directory, relative to it."""
    found = (path for pattern in ALONG for path in sorted(source.glob(pattern)) if path.is_file())
    return [path.relative_to(source) for path in dict.fromkeys(found)]


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def fill_directory(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, RawTensor],
    *,
    files_from: Path | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write a model into a directory that exists, each file whole, `config.json` last: where it is, the model is.

    Gives the sha256 of each file of weights by its name.
    """
    model = read_config(dict(config), directory / "config.json")
    expected = model.parameter_shapes()
    specs = specs_of(tensors)
    shapes = {name: spec.shape for name, spec in specs.items()}
    assert shapes == expected, f"not the model's parameters: {sorted(shapes.items() ^ expected.items())[:4]}"
    assert all(spec.dtype == config["dtype"] for spec in specs.values()), f"not all {config['dtype']}"
    digests = save_sharded(directory, as_stored(tensors, model), max_shard_bytes)
    put_along(directory, files_from, extra_files)
    write_atomic(directory / "config.json", json_bytes(dict(config)))
    return digests


def put_along(directory: Path, files_from: Path | None, extra_files: Mapping[str, bytes] | None = None) -> None:
    """Copies what goes along with the weights, and writes what was made for that."""
    if files_from is not None and files_from.resolve() != directory.resolve():
        for path in files_along(files_from):
            with write_errors(directory / path):
                (directory / path).parent.mkdir(exist_ok=True)
            with reading(files_from / path):
                content = (files_from / path).read_bytes()
            write_atomic(directory / path, content)
    for name, made in (extra_files or {}).items():
        write_atomic(directory / name, made)


def as_stored(tensors: Mapping[str, RawTensor], config: DecoderConfig) -> Mapping[str, RawTensor]:
    """The same tensors under the names that they have in the family's checkpoints."""
    if not config.stored:
        return tensors
    names = dict(config.stored)
    if isinstance(tensors, LazyTensors):
        return LazyTensors({names.get(name, name): entry for name, entry in tensors.entries.items()})
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def save_model(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, RawTensor],
    tokenizer_files_from: Path | None,
    *,
    extra_files: Mapping[str, bytes] | None = None,
    into_run: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a new HF model directory, whole or not at all.

    `config` is a `config.json` as read; its dtype becomes that of `tensors`, which must share one. With `into_run` the
    directory is a run's own, which exists: the files appear one by one, `config.json` last.
    """
    dtypes = {spec.dtype for spec in specs_of(tensors).values()}
    assert len(dtypes) == 1, f"weights of more than one dtype: {sorted(dtypes)}"
    complete = complete_config(config, directory / "config.json", dtypes.pop())
    options: dict[str, Any] = {
        "files_from": tokenizer_files_from,
        "extra_files": extra_files,
        "max_shard_bytes": max_shard_bytes,
    }
    if into_run:
        with write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "config.json").unlink(missing_ok=True)
        fill_directory(directory, complete, tensors, **options)
        return
    with new_directory(directory) as partial:
        fill_directory(partial, complete, tensors, **options)
