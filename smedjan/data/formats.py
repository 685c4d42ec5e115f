"""Rows of a data file: TRL's row types, found by their keys, each with the file and line it came from.

    {"text": str}                                                    -> kind "text"
    {"prompt": str, "completion": str}                               -> kind "prompt+completion"
    {"prompt": [message, ...], "completion": [message, ...]}         -> kind "prompt+completion", conversational
    {"messages": [message, ...], "tools": [...] (optional)}          -> kind "messages"

A message is {"role": str, "content": str, ...}. Files: `.jsonl`, `.json` (an array, or one row a line), `.csv`,
`.parquet`, `.arrow`, or a folder with `train`, `valid` and `test` files, or shards (`train-00000-of-00002.parquet`).
Columns that are no part of a row type (ids, scores) are not read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from smedjan.errors import DataError

Kind = Literal["text", "prompt+completion", "messages"]
Message = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation", "val"),
    "test": ("test",),
}
"""The file names a split of a folder may have (mlx-lm says `valid`, the Hub says `validation`)."""

_ROW_TYPES: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt+completion": ("prompt", "completion"),
    "messages": ("messages",),
}
_KNOWN_COLUMNS = {"text", "prompt", "completion", "messages", "tools", "label"}
_KNOWN_COLUMNS |= {"chosen", "rejected", "conversations", "instruction", "output"}
"""The columns that say what a row is; a table's others are not even decoded."""
_ONE_TYPE = "give every row `text`, `prompt` + `completion`, or `messages`"
_MAX_CSV_FIELD = 2**31 - 1


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One checked row. Of `text`, `prompt` and `completion`, and `messages` only what `kind` says is filled; a
    conversational prompt + completion is `messages`, of which the first `prompt_messages` are the prompt."""

    kind: Kind
    source: Source
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    prompt_messages: int = 0
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def file(self) -> Path:
        return self.source.file

    @property
    def line(self) -> int:
        return self.source.line

    @property
    def shape(self) -> str:
        """The row type by name; every row of a file has the same one."""
        return f"{self.kind} of messages" if self.kind == "prompt+completion" and self.messages else self.kind


def read_rows(path: str | PathLike[str], split: str = "train") -> list[Row]:
    """Every row of a file, or of the `split` of a folder, in order. A file is itself one split, whichever is asked.

    Raises DataError naming file and line at the first row that does not parse, lacks or empties a field, or is of
    another type than the row before; and for a file without rows.
    """
    path = Path(path)
    files = (path,) if path.is_file() else split_files(path, split)
    if not files:
        known = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)) or "no data file"
        raise DataError(
            f"no {split} file in this folder ({known})", file=path, remedy=f"name one {split}.jsonl, or give the file"
        )
    rows: list[Row] = []
    for file in files:
        before = len(rows)
        for source, record in _read_records(file):
            row = row_of(record, source)
            if rows and row.shape != rows[0].shape:
                raise source.error(f"a row of type {row.shape}, but {rows[0].source} is {rows[0].shape}", _ONE_TYPE)
            rows.append(row)
        if len(rows) == before:
            raise DataError("holds no row", file=file, remedy="give a file with at least one row")
    return rows


def split_files(folder: str | PathLike[str], split: str) -> tuple[Path, ...]:
    """The file of `split` ("train", "valid" or "test") in a folder, or its shards in order; () when it has none."""
    folder = Path(folder)
    assert split in SPLITS, f"unknown split {split!r}"
    if not folder.is_dir():
        raise DataError(
            "no such file or folder", file=folder, remedy=f"give a file ({', '.join(SUFFIXES)}) or a folder"
        )
    names = re.compile(rf"(?:{'|'.join(SPLITS[split])})(?:-(\d+)-of-(\d+))?")
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


def row_of(record: object, source: Source) -> Row:
    """A parsed record as a Row: its type found by its keys, its fields checked."""
    if not isinstance(record, Mapping):
        raise source.error(f"is {_called(record)}, not an object", 'write one {"prompt": ..., "completion": ...} a row')
    given = {key for key, value in record.items() if value is not None}
    kinds = [kind for kind, keys in _ROW_TYPES.items() if given.issuperset(keys)]
    if len(kinds) != 1:
        raise source.error(*_untyped(given, kinds, list(record)))
    if kinds[0] == "text":
        return Row(kind="text", source=source, text=_text(record["text"], "text", source))
    if isinstance(record.get("label"), bool) and kinds[0] == "prompt+completion":
        raise source.error(
            "a preference row (`label` says whether the completion is good)",
            "keep the rows whose label is true, without `label`",
        )
    tools = _tools(record.get("tools"), source)
    if kinds[0] == "messages":
        return Row(
            kind="messages", source=source, messages=_messages(record["messages"], "messages", source), tools=tools
        )
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise source.error(
            f"prompt is {_called(prompt)} and completion {_called(completion)}", "make both strings or both messages"
        )
    if not isinstance(prompt, list):
        prompt, completion = _text(prompt, "prompt", source), _text(completion, "completion", source)
        return Row(kind="prompt+completion", source=source, prompt=prompt, completion=completion)
    before = _messages(prompt, "prompt", source)
    messages = before + _messages(completion, "completion", source)
    return Row(kind="prompt+completion", source=source, messages=messages, prompt_messages=len(before), tools=tools)


def _untyped(given: set[str], kinds: list[Kind], keys: list[str]) -> tuple[str, str]:
    """Message and remedy for a row that is of no type, or of several."""
    if kinds:
        return f"is a row of {len(kinds)} types: {' and '.join(kinds)}", _ONE_TYPE
    if given >= {"chosen", "rejected"}:
        return "is a preference row (`chosen`, `rejected`)", "give `prompt` and `completion` (the chosen answer)"
    if "conversations" in given:
        return "is a ShareGPT row (`conversations`)", "rename it `messages`, `from` to `role` and `value` to `content`"
    if given >= {"instruction", "output"}:
        return "is an Alpaca row (`instruction`, `output`)", "rename them `prompt` and `completion`"
    if given & {"prompt", "completion"}:
        lacking = "completion" if "prompt" in given else "prompt"
        return f"lacks `{lacking}`", f"add `{lacking}`, or remove the row"
    found = ", ".join(map(str, keys)) or "none"
    return f"lacks `text`, `prompt` + `completion` and `messages` (keys: {found})", _ONE_TYPE


def _text(value: object, name: str, source: Source) -> str:
    if not isinstance(value, str):
        raise source.error(f"`{name}` is {_called(value)}, not a string", f"write `{name}` as a string")
    if not value:
        raise source.error(f"`{name}` is empty", f"fill `{name}`, or remove the row")
    if _has_surrogate(value):
        raise source.error(
            f"`{name}` holds half of a surrogate pair, which is no character", "remove that \\udXXX escape"
        )
    return value


def _messages(value: object, name: str, source: Source) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise source.error(f"`{name}` is {_called(value)}, not a list", 'write [{"role": ..., "content": ...}, ...]')
    if not value:
        raise source.error(f"`{name}` is empty", "add its messages, or remove the row")
    messages: list[Message] = []
    for index, given in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(given, Mapping):
            raise source.error(f"`{where}` is {_called(given)}, not a message", 'write {"role": ..., "content": ...}')
        # As transformers does: APIs write `tool_calls: null` and Arrow fills every column, but templates expect neither
        message = {str(key): _plain(part, where, source) for key, part in given.items() if part is not None}
        for key in ("role", "content"):
            if key not in message and not (key == "content" and "tool_calls" in message):
                raise source.error(f"`{where}` lacks `{key}`", f"add `{key}`")
        role = _text(message["role"], f"{where}.role", source)
        if message.get("content") != "" or (role == "assistant" and "tool_calls" not in message):
            _text(message.get("content", " "), f"{where}.content", source)
        messages.append(message)
    return tuple(messages)


def _tools(value: object, source: Source) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise source.error(f"`tools` is {_called(value)}, not a list of JSON schemas", "write one object a tool")
    return tuple(_plain(tool, "tools", source) for tool in value)


def _plain(value: Any, where: str, source: Source) -> Any:
    """What JSON can say, without the nulls that Arrow puts into structs; a template must not see anything else."""
    if isinstance(value, dict):
        return {str(key): _plain(part, where, source) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part, where, source) for part in value]
    if isinstance(value, str) and _has_surrogate(value):
        raise source.error(
            f"`{where}` holds half of a surrogate pair, which is no character", "remove that \\udXXX escape"
        )
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise source.error(f"`{where}` holds {_called(value)}", "keep to what JSON can say")


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _called(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value)) or ("an object" if isinstance(value, Mapping) else f"a {type(value).__name__}")


def _read_records(file: Path) -> Iterator[tuple[Source, object]]:
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_arrow,
        ".arrow": _read_arrow,
    }
    if file.suffix not in readers:
        raise DataError(f"unknown file type {file.suffix!r}", file=file, remedy=f"give one of {', '.join(readers)}")
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=file, remedy="check the file") from error


def _read_jsonl(file: Path) -> Iterator[tuple[Source, object]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            source = Source(file=file, line=number)
            text = _decode(line, source)
            if text.strip():
                yield source, _parse(text, source)


def _read_json(file: Path) -> Iterator[tuple[Source, object]]:
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_jsonl(file)
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


def _read_csv(file: Path) -> Iterator[tuple[Source, object]]:
    # The limit (131,072 characters a field) is the process's: read all before anyone else can see it lifted
    limit = csv.field_size_limit(_MAX_CSV_FIELD)
    try:
        rows = list(_csv_rows(file))
    finally:
        csv.field_size_limit(limit)
    yield from rows


def _csv_rows(file: Path) -> Iterator[tuple[Source, object]]:
    with file.open("rb") as stream:
        text = _decode(stream.read(), Source(file=file, line=1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise Source(file=file, line=1).error("a column is named twice", "rename one of them")
        line = reader.line_num + 1
        for values in reader:
            source = Source(file=file, line=line)
            line = reader.line_num + 1
            if not values:
                continue
            if len(values) != len(header):
                raise source.error(f"{len(values)} fields for {len(header)} columns", "quote fields that hold commas")
            yield source, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise Source(file=file, line=max(1, reader.line_num)).error(
            f"is not CSV: {error}", "quote the field"
        ) from error


def _read_arrow(file: Path) -> Iterator[tuple[Source, object]]:
    import pyarrow
    from pyarrow import ipc, parquet

    number = 0
    try:
        # `datasets` writes .arrow as a stream, other tools as a file with a footer
        with pyarrow.memory_map(str(file)) as mapped:
            if file.suffix == ".parquet":
                batches = parquet.ParquetFile(mapped).iter_batches()
            elif mapped.read(6) == b"ARROW1":
                footed = ipc.open_file(mapped)
                batches = (footed.get_batch(index) for index in range(footed.num_record_batches))
            else:
                mapped.seek(0)
                batches = iter(ipc.open_stream(mapped))
            for batch in batches:
                known = [name for name in batch.schema.names if name in _KNOWN_COLUMNS]
                for record in (batch.select(known) if known else batch).to_pylist():
                    number += 1
                    yield Source(file=file, line=number, unit="row"), record
    except UnicodeDecodeError as error:
        raise DataError(f"a string after row {number} is not UTF-8", file=file, remedy="write it again") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"is no {file.suffix[1:]} file: {error}", file=file, remedy="write it again") from error
