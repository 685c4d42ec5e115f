"""Tokens of a data file, kept: a second run on the same rows, tokenizer and template starts at once.

A file of the cache is named by the sha256 of all that decides its tokens: the content of the data files (not their
paths), the tokenizer, the chat template and what it prints of the date, `loss_on`, `max_length`, `too_long`, `broken`,
and the code of this package. It is a safetensors file of the arrays of `tokens`, which are mapped: tokens need not fit
into memory. It is there whole or not at all and holds the sha256 of what it says; where that is another, the rows are
tokenized anew, which is said.

Where: $SMEDJAN_CACHE, or $XDG_CACHE_HOME/smedjan, or ~/.cache/smedjan. `SMEDJAN_CACHE=off`: tokens are kept in memory,
and nowhere else. Files that no run has read for a month are removed.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from smedjan.checkpoint.digest import sha256_of_file
from smedjan.checkpoint.raw import specs_of
from smedjan.checkpoint.safetensors import open_file, read_metadata, save_file
from smedjan.data.files import Broken, OnBroken, Source, data_files
from smedjan.data.formats import stream_rows
from smedjan.data.mask import Counts, LossOn, Tokenized, Tokenizer, TooLong, tokenize_rows
from smedjan.data.tokens import ARRAYS, Tokens, TokenWriter
from smedjan.errors import CheckpointError, DataError

Say = Callable[[str], None]

ENVIRONMENT = "SMEDJAN_CACHE"
SUFFIX = ".tokens"
FLAG = "--train.broken"
UNUSED_SECONDS = 30 * 24 * 3600
_ELSEWHERE = f"free some space, or set {ENVIRONMENT} to another folder, or to off"
_ABOUT = "about"
_SHA256 = "sha256"
_CLOCK = re.compile(r"\bstrftime_now\b(?!\s+is\b)")
_STRFTIME = re.compile(r"""strftime_now\s*\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


def folder() -> Path | None:
    """Where token files are kept; None: nowhere."""
    given = os.environ.get(ENVIRONMENT)
    if given == "off":
        return None
    if given:
        return Path(given) / "tokens"
    # A relative XDG_CACHE_HOME is to be ignored, says its specification
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "smedjan" / "tokens"


def tokenize_file(
    path: Path,
    split: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    loss_on: LossOn = "completion",
    too_long: TooLong = "error",
    broken: OnBroken = "error",
    now: datetime,
    say: Say = lambda line: None,
) -> Tokenized:
    """The rows of a file, or of the split of a folder, as `tokenize_rows` makes them: from the cache, or into it."""
    files = data_files(path, split)
    before = [_state(file) for file in files]
    options = {"max_length": max_length, "loss_on": loss_on, "too_long": too_long, "broken": broken}

    def make(writer: TokenWriter) -> Tokenized:
        left = Broken(broken, flag=FLAG)
        rows = stream_rows(path, split, chat=tokenizer.chat_template is not None, broken=left)
        made = tokenize_rows(
            rows,
            tokenizer,
            max_length=max_length,
            loss_on=loss_on,
            too_long=too_long,
            now=now,
            into=writer,
            broken=left,
        )
        if before != [_state(file) for file in files]:
            raise DataError(
                "was changed while it was read", file=path, remedy="wait until it is written, and try again"
            )
        return made

    if (where := folder()) is None:
        return make(TokenWriter(lambda name: io.BytesIO()))
    key = _key(files, tokenizer, now, options)
    kept = where / f"{key}{SUFFIX}"
    try:
        where.mkdir(parents=True, exist_ok=True)
        if kept.exists():
            try:
                found = _read(kept, files)
                os.utime(kept)
                return found
            except CheckpointError as damage:
                say(f"{kept}: {damage.message}; the rows are tokenized anew")
        with ExitStack() as open_files:
            made = make(TokenWriter(lambda name: open_files.enter_context(TemporaryFile(dir=where))))
            _write(kept, files, made)
        _remove_unused(where)
        return _read(kept, files)
    except CheckpointError as error:
        raise DataError(error.message, file=where, field=ENVIRONMENT, remedy=_ELSEWHERE) from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            say(f"{where}: cannot be written, so tokens stay in memory; set {ENVIRONMENT} to another folder, or to off")
            return make(TokenWriter(lambda name: io.BytesIO()))
        raise DataError(
            f"cannot keep tokens: {error.strerror or error}", file=where, field=ENVIRONMENT, remedy=_ELSEWHERE
        ) from error


def _state(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _key(files: Sequence[Path], tokenizer: Tokenizer, now: datetime, options: dict[str, Any]) -> str:
    decides = {
        "data": [(file.suffix, sha256_of_file(file)) for file in files],
        "tokenizer": tokenizer.fingerprint(),
        "dates": dates(tokenizer.chat_template or "", now),
        "code": _code(),
        **options,
    }
    return sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def dates(template: str, now: datetime) -> list[str]:
    """What the template prints of the clock: nothing for most, a day for Llama's. All, where it is not plain."""
    spelled = [double or single for double, single in _STRFTIME.findall(template)]
    if len(spelled) == len(_CLOCK.findall(template)):
        return [now.strftime(form) for form in spelled]
    return [now.isoformat()]


@lru_cache(maxsize=1)
def _code() -> str:
    """Of this package: another version may tokenize or mask otherwise."""
    here = Path(__file__).parent
    sources = sorted(file for file in here.rglob("*") if file.suffix in (".py", ".jinja"))
    return sha256(b"\0".join(part for file in sources for part in (file.name.encode(), file.read_bytes()))).hexdigest()


def _write(file: Path, files: Sequence[Path], made: Tokenized) -> None:
    first, told = made.first_broken, None
    if first is not None:
        told = ([str(file) for file in files].index(str(first.file)), first.field, first.message, first.remedy)
    about = {
        "first": [(files.index(source.file), source.line, source.unit) for source in made.examples.first],
        "counts": asdict(made.counts),
        "converted": made.converted,
        "first_broken": told,
    }
    said = json.dumps(about)
    save_file(file, made.examples.tensors, {_ABOUT: said, _SHA256: _digest(file.name, said, made.examples)})


def _digest(name: str, about: str, tokens: Tokens) -> str:
    digest = sha256("\0".join((name, about, tokens.sha256)).encode())
    for array in ("lines", "files", "truncated"):
        for part in tokens.tensors[array].parts():
            digest.update(part.data)
    return digest.hexdigest()


def _read(file: Path, files: Sequence[Path]) -> Tokenized:
    """The tokens, mapped. Every byte is checked: a bit that fell over on the disk would be trained on."""
    tensors, metadata = open_file(file), read_metadata(file)
    if {name: spec.dtype for name, spec in specs_of(tensors).items()} != ARRAYS:
        raise CheckpointError("is no file of tokens", file=file)
    made = dict(tensors)
    about = metadata.get(_ABOUT, "")
    if _digest(file.name, about, Tokens(made, ())) != metadata.get(_SHA256):
        raise CheckpointError("is damaged", file=file)
    said = json.loads(about)
    first = [Source(file=files[index], line=line, unit=unit) for index, line, unit in said["first"]]
    broken = None
    if said["first_broken"] is not None:
        index, field, message, remedy = said["first_broken"]
        broken = DataError(message, file=files[index], field=field, remedy=remedy)
    return Tokenized(
        examples=Tokens(made, first),
        counts=Counts(**said["counts"]),
        converted=said["converted"],
        first_broken=broken,
    )


def _remove_unused(where: Path) -> None:
    """Files that no run has read for long, and what killed runs have left."""
    oldest = time.time() - UNUSED_SECONDS
    for file in where.iterdir():
        # Another run may be at the same: whoever comes second finds nothing, or may not
        with suppress(OSError):
            if file.suffix in (SUFFIX, ".tmp") and file.stat().st_mtime < oldest:
                file.unlink()
