"""Damaged copies of model directories, and what an import of each may come to.

An import of a damaged directory is refused in one line that names the file and the field, and leaves nothing; or it
gives the model that was there before the damage, to the bit; or, where a key is gone that older files do not have
either, it says in its report which value it took. Any other exception, and any other logits, is a failure.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import smedjan
from smedjan.errors import SmedjanError
from smedjan.hf.import_model import ImportReport, import_model
from smedjan.models.registry import read_config
from tests.conftest import VOCAB
from tests.families import make_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
IDS = np.random.default_rng(0).integers(4, VOCAB, (2, 20))
"""Longer than every window and than the original lengths of scaled positions."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """`apply` changes a directory whose files are hard links (see `put`). `names`: the error names one of them.

    `file`: the end of the path that the error names. `said`: without the key, the model may be another one if the
    report tells which value was taken; else a success must have the logits from before. `weighed`: the config is sound
    in itself, so that the error may name the tensor that it contradicts, and must say that config.json does.
    """

    what: str
    file: str
    names: tuple[str, ...]
    apply: Callable[[Path], None]
    said: bool = False
    weighed: bool = False
    refused: bool = False


def put(file: Path, content: bytes) -> None:
    """Replace a file. Writing into it would change every hard link to it."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def put_json(file: Path, value: Any) -> None:
    put(file, json.dumps(value).encode())


def make_source(directory: Path, family: str, settings: dict[str, Any], **saving: Any) -> Path:
    """A tiny model and a tokenizer of one token a character."""
    make_model(family, settings, attention="eager").save_pretrained(directory, **saving)
    tokens = {"<pad>": 3, "<s>": 1, "</s>": 2, "<unk>": 0} | {chr(64 + number): number for number in range(4, VOCAB)}
    plain = tokenizers.Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(directory)
    return directory


def logits_of(directory: Path) -> np.ndarray:
    """Made once for each configuration and weights: what is computed depends on nothing else."""
    config = read_config(json.loads((directory / "config.json").read_text()), directory / "config.json")
    weights = [sha256(file.read_bytes()).hexdigest() for file in sorted(directory.glob("*.safetensors"))]
    key = (repr(config), *weights)
    if key not in _MADE:
        _MADE[key] = _computed(directory)
    return _MADE[key]


_MADE: dict[tuple[str, ...], np.ndarray] = {}


def _computed(directory: Path) -> np.ndarray:
    return smedjan.load(directory, backend="torch_reference", attention="eager").logits(IDS)


def copy_of(source: Path, copy: Path) -> Path:
    """The same files under other names, by hard links."""
    copy.mkdir()
    for file in source.iterdir():
        os.link(file, copy / file.name)
    return copy


def failure(source: Path, expected: np.ndarray, damage: Damage, scratch: Path) -> str | None:
    """What is wrong with the outcome of `damage`, or None. `scratch` is an empty folder, and is so again."""
    copy, out = copy_of(source, scratch / "damaged"), scratch / "out"
    damage.apply(copy)
    try:
        try:
            report = import_model(copy, out)
        except SmedjanError as error:
            return _bad_error(error, damage, copy, sorted(path.name for path in scratch.iterdir()))
        except Exception as error:  # the very thing that is looked for
            return f"{damage.what}: {type(error).__name__}: {error}"
        return _bad_success(report, damage, expected, out)
    finally:
        remove(copy)
        remove(out)


def _bad_error(error: SmedjanError, damage: Damage, copy: Path, left: list[str]) -> str | None:
    text = str(error)
    if left != ["damaged"]:
        return f"{damage.what}: left {left}"
    if "\n" in text or not error.remedy:
        return f"{damage.what}: not one line with a remedy: {text!r}"
    if damage.weighed and error.file is not None and error.file.startswith(str(copy)) and "config.json" in text:
        return None
    if error.file is None or not error.file.startswith(str(copy)) or not error.file.endswith(damage.file):
        return f"{damage.what}: names the file {error.file}, not {damage.file}: {text}"
    if damage.names and not any(name in (error.field or "") for name in damage.names):
        return f"{damage.what}: names {error.field!r}, not {' or '.join(damage.names)}: {text}"
    return None


def _bad_success(report: ImportReport, damage: Damage, expected: np.ndarray, out: Path) -> str | None:
    if damage.refused:
        return f"{damage.what}: is imported"
    try:
        found = logits_of(out)
    except Exception as error:  # the very thing that is looked for
        return f"{damage.what}: imported, then {type(error).__name__}: {error}"
    if found.shape == expected.shape and np.array_equal(found, expected):
        return None
    if damage.said and any(name in note for note in report.notes for name in damage.names):
        return None
    return f"{damage.what}: other logits, without a word"


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o700)
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    elif os.path.lexists(path):
        path.unlink()


def check(source: Path, damages: list[Damage], scratch: Path) -> None:
    """Each damage on its own copy of `source`; every bad outcome is in the one message."""
    expected = logits_of(source)
    scratch.mkdir()
    # What a power cut leaves is tested elsewhere, and waiting for the disk is most of the time here.
    with patch.object(os, "fsync"):
        found = [failure(source, expected, damage, scratch) for damage in damages]
    bad = [each for each in found if each is not None]
    assert not bad, "\n".join([f"{len(bad)} of {len(damages)}:", *bad])


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def edit_header(
    change: Callable[[dict[str, Any]], object], data: Callable[[bytes], bytes] = bytes
) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / WEIGHTS
        header, content = header_of(file)
        change(header)
        put(file, with_header(header, data(content)))

    return apply
