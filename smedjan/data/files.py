"""Data files as records, one at a time, each with the file and line it came from: rows are never all in memory, but for
those of a `.json` array.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from smedjan.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation", "val"),
    "test": ("test",),
}
"""The file names a split of a folder may have (mlx-lm says `valid`, the Hub says `validation`)."""

_SAVED = "state.json"
"""What `datasets.Dataset.save_to_disk` writes beside its .arrow files."""
_MAX_CSV_FIELD = 2**31 - 1
_TABLE_ROWS = 256
"""Rows of a table that are decoded at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a row was read: `line` counts from 1, in `unit`s (physical lines of text files, rows of the others)."""

    file: Path
    line: int
    unit: Literal["line", "row"] = "line"

    @property
    def field(self) -> str:
        return f"{self.unit} {self.line}"

    def __str__(self) -> str:
        return f"{self.file}: {self.field}"

    def error(self, message: str, remedy: str | None = None) -> DataError:
        return DataError(message, file=self.file, field=self.field, remedy=remedy)


OnBroken = Literal["error", "drop"]


class Broken:
    """What becomes of rows that cannot be read or masked: the first one is an error, or all are left out and counted.

    `flag` is what asks for the latter, for the remedy; where there is none, the row is to be repaired.
    """

    def __init__(self, on: OnBroken = "error", *, flag: str | None = None) -> None:
        assert on in get_args(OnBroken), on
        self.on, self.flag = on, flag
        self.count = 0
        self.first: DataError | None = None

    def __call__(self, error: DataError) -> None:
        """One row more, by what is wrong with it."""
        if self.on == "error":
            if self.flag is None:
                raise error
            remedy = "; ".join(part for part in (error.remedy, f"{self.flag} drop leaves broken rows out") if part)
            raise DataError(error.message, file=error.file, field=error.field, remedy=remedy) from error
        self.count += 1
        self.first = self.first or error

    def none_left(self, file: str | PathLike[str]) -> None:
        """An error, if there were any: no other row is in the file."""
        if self.first is not None:
            raise DataError(
                f"no row is left, {self.count} are broken; {self.first.field}: {self.first.message}",
                file=file,
                remedy=self.first.remedy,
            )


def data_files(path: str | PathLike[str], split: str) -> tuple[Path, ...]:
    """The file itself, which is one split whichever is asked, or those of the `split` of a folder, in order; not ()."""
    path = Path(path)
    files = (path,) if path.is_file() else split_files(path, split)
    if not files:
        known = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)) or "no data file"
        raise DataError(
            f"no {split} file in this folder ({known})", file=path, remedy=f"name one {split}.jsonl, or give the file"
        )
    return files


def split_files(folder: str | PathLike[str], split: str) -> tuple[Path, ...]:
    """The files of `split` ("train", "valid" or "test") in a folder, in order; () when it has none. They are

    train.jsonl, or shards: train-00000-of-00002.parquet     in the folder, or in its `data/` (as on the Hub)
    train/*.parquet                                          all of one type, by name
    what `datasets.save_to_disk` wrote                       a single Dataset is one split, whichever is asked
    """
    folder = Path(folder)
    assert split in SPLITS, f"unknown split {split!r}"
    if not folder.is_dir():
        raise DataError(
            "no such file or folder", file=folder, remedy=f"give a file ({', '.join(SUFFIXES)}) or a folder"
        )
    if (folder / _SAVED).is_file():
        return _saved(folder)
    inner = [folder / name for name in SPLITS[split] if (folder / name).is_dir()]
    places = [_named(folder, split), _named(folder / "data", split), *map(_whole_folder, inner)]
    found = [place for place in places if place]
    if len(found) > 1:
        listed = ", ".join(place[0].relative_to(folder).as_posix() for place in found)
        raise DataError(f"several {split} files: {listed}", file=folder, remedy="keep one of them, or give the file")
    return found[0] if found else ()


def _named(folder: Path, split: str) -> tuple[Path, ...]:
    """The file called as the split, or its shards."""
    if not folder.is_dir():
        return ()
    # The hub's own conversions end in a hash
    names = re.compile(rf"(?:{'|'.join(SPLITS[split])})(?:-(\d+)-of-(\d+)(?:-[0-9a-f]{{16}})?)?")
    found = [
        (file, match)
        for file in sorted(folder.iterdir())
        if file.suffix in SUFFIXES and (match := names.fullmatch(file.stem)) and file.is_file()
    ]
    whole = [file for file, match in found if match[1] is None]
    shards = [(file, int(match[1]), int(match[2])) for file, match in found if match[1] is not None]
    if len(whole) > 1 or (whole and shards) or len({total for _, _, total in shards}) > 1:
        listed = ", ".join(file.name for file, _ in found)
        raise DataError(f"several {split} files: {listed}", file=folder, remedy="keep one of them, or give the file")
    if shards and [number for _, number, _ in shards] != list(range(shards[0][2])):
        raise DataError(
            f"{len(shards)} of {shards[0][2]} {split} shards", file=folder, remedy="bring the missing shards"
        )
    return tuple(whole) or tuple(file for file, _, _ in shards)


def _whole_folder(folder: Path) -> tuple[Path, ...]:
    if (folder / _SAVED).is_file():
        return _saved(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len({file.suffix for file in files}) > 1:
        listed = ", ".join(file.name for file in files)
        raise DataError(f"files of several types: {listed}", file=folder, remedy="keep those of one type")
    return tuple(files)


def _saved(folder: Path) -> tuple[Path, ...]:
    """The .arrow files that the state.json of `Dataset.save_to_disk` names, in their order."""
    state = folder / _SAVED
    try:
        data = json.loads(state.read_bytes())
        names = [entry["filename"] for entry in data["_data_files"]]
        chosen = data.get("_indices_files")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"is not the state of a saved dataset: {error}", file=state, remedy="save it again") from error
    if chosen:
        raise DataError("chooses rows by an index", file=state, remedy="save it again after flatten_indices()")
    files = tuple(folder / str(name) for name in names)
    for file in files:
        if file.parent != folder or not file.is_file():
            raise DataError(
                f"names {file.name}, which is not there", file=state, remedy="bring the file, or save it again"
            )
    return files


def read_records(
    file: Path, columns: Collection[str], broken: Callable[[DataError], None] | None = None
) -> Iterator[tuple[Source, object]]:
    """The records of a file, each parsed when it is asked for. Of a table that has any of `columns` no other column is
    decoded.

    `broken` gets the error of a line that does not parse (by default it is raised), and the lines behind it follow.
    What leaves open where the next row begins (a CSV's quotes, an array's brackets, a table) is always raised.
    """
    broken = broken or Broken()
    readers: dict[str, Callable[[Path], Iterator[tuple[Source, object]]]] = {
        ".jsonl": lambda lines: _read_jsonl(lines, broken),
        ".json": lambda lines: _read_json(lines, broken),
        ".csv": lambda lines: _read_csv(lines, broken),
        ".parquet": lambda table: _read_arrow(table, columns),
        ".arrow": lambda table: _read_arrow(table, columns),
    }
    if file.suffix not in readers:
        raise DataError(f"unknown file type {file.suffix!r}", file=file, remedy=f"give one of {', '.join(readers)}")
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=file, remedy="check the file") from error


def _read_jsonl(file: Path, broken: Callable[[DataError], None]) -> Iterator[tuple[Source, object]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            source = Source(file=file, line=number)
            try:
                text = _decode(line, source)
                if not text.strip():
                    continue
                record = _parse(text, source)
            except DataError as error:
                broken(error)
                continue
            yield source, record


def _read_json(file: Path, broken: Callable[[DataError], None]) -> Iterator[tuple[Source, object]]:
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_jsonl(file, broken)
        return
    array = _parse(_decode(file.read_bytes(), Source(file=file, line=1)), Source(file=file, line=1))
    assert isinstance(array, list)
    for number, record in enumerate(array, start=1):
        yield Source(file=file, line=number, unit="row"), record


def _decode(data: bytes, source: Source) -> str:
    try:
        return data.decode("utf-8-sig" if source.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise source.error(f"byte {error.start} is not UTF-8", "save the file as UTF-8") from error


def _parse(text: str, source: Source) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        at = Source(file=source.file, line=source.line + error.lineno - 1)
        raise at.error(f"is not JSON: {error.msg} at column {error.colno}", "write one JSON object a line") from error
    except (ValueError, RecursionError) as error:
        raise source.error(f"is not JSON we read: {error}", "repair or remove the row") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"key {twice!r} is there twice")
    return record


def _read_csv(file: Path, broken: Callable[[DataError], None]) -> Iterator[tuple[Source, object]]:
    # Not bytes by lines: a field may hold line breaks of any kind. A byte that is no UTF-8 becomes half a surrogate
    # pair, so that its line can be named.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        source = Source(file=file, line=1)
        header = _csv_row(reader, source) or []
        if any(map(has_surrogate, header)):
            raise source.error(*_NOT_UTF8)
        if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
            raise source.error(f"one column, {_short(header[0])!r}", f"separate columns by commas, not by {mark!r}")
        if len(set(header)) != len(header):
            raise source.error("a column is named twice", "rename one of them")
        while True:
            source = Source(file=file, line=reader.line_num + 1)
            values = _csv_row(reader, source)
            if values is None:
                return
            if not values:
                continue
            if any(map(has_surrogate, values)):
                broken(source.error(*_NOT_UTF8))
            elif len(values) != len(header):
                broken(source.error(*_uneven(values, header)))
            else:
                yield source, dict(zip(header, values, strict=True))


_NOT_UTF8 = ("is not UTF-8", "save the file as UTF-8")


def _uneven(values: list[str], header: list[str]) -> tuple[str, str]:
    """Message and remedy of a row that has more fields than there are columns, or fewer."""
    counted = f"{len(values)} field{'s' * (len(values) != 1)} for {len(header)} columns ({', '.join(header)})"
    if len(values) < len(header):
        return f"{counted}: `{header[len(values)]}` is not there", "write it, or two quotes where it is empty"
    over = values[len(header)]
    return f"{counted}: none for {_short(over)!r}", "quote fields that hold commas"


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f"{text[:most]}\u2026"


def _csv_row(reader: Any, source: Source) -> list[str] | None:
    """The next row, None at the end. The limit of a field (131,072 characters) is the process's: it is lifted only
    while one row is read."""
    limit = csv.field_size_limit(_MAX_CSV_FIELD)
    try:
        values: list[str] | None = next(reader, None)
    except csv.Error as error:
        at = Source(file=source.file, line=max(1, reader.line_num))
        raise at.error(f"is not CSV: {error}", "quote the field") from error
    finally:
        csv.field_size_limit(limit)
    return values


def has_surrogate(text: str) -> bool:
    """Half of a surrogate pair is no character: JSON escapes can spell it, nothing can encode it."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _read_arrow(file: Path, columns: Collection[str]) -> Iterator[tuple[Source, object]]:
    import pyarrow
    from pyarrow import ipc, parquet

    number = 0
    try:
        # `datasets` writes .arrow as a stream, other tools as a file with a footer
        with pyarrow.memory_map(str(file)) as mapped:
            if file.suffix == ".parquet":
                batches = parquet.ParquetFile(mapped).iter_batches(_TABLE_ROWS)
            elif mapped.read(6) == b"ARROW1":
                footed = ipc.open_file(mapped)
                batches = (footed.get_batch(index) for index in range(footed.num_record_batches))
            else:
                mapped.seek(0)
                batches = iter(ipc.open_stream(mapped))
            for batch in batches:
                known = [name for name in batch.schema.names if name in columns]
                chosen = batch.select(known) if known else batch
                for start in range(0, len(chosen), _TABLE_ROWS):
                    for record in chosen.slice(start, _TABLE_ROWS).to_pylist():
                        number += 1
                        yield Source(file=file, line=number, unit="row"), record
    except UnicodeDecodeError as error:
        raise DataError(f"a string after row {number} is not UTF-8", file=file, remedy="write it again") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"is no {file.suffix[1:]} file: {error}", file=file, remedy="write it again") from error
