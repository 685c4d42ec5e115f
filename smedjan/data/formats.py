"""Rows of a data file: TRL's row types, found by their keys, each with the file and line it came from.

    {"text": str}                                                    -> kind "text"
    {"prompt": str, "completion": str}                               -> kind "prompt+completion"
    {"prompt": [message, ...], "completion": [message, ...]}         -> kind "prompt+completion", conversational
    {"messages": [message, ...], "tools": [...] (optional)}          -> kind "messages"

A message is {"role": str, "content": str, ...}; tools are JSON schemas, or the JSON of them as a string. ShareGPT and
Alpaca are converted (`convert`). TRL's preference rows (`chosen` and `rejected`, `label`) are refused by name: to train
on one of the answers would leave out what they say. Columns that are no part of a row type (ids, scores) are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from smedjan.data.convert import COLUMNS, HOW, Origin, convert, origin_of
from smedjan.data.files import (
    SPLITS,
    SUFFIXES,
    Broken,
    OnBroken,
    Source,
    data_files,
    has_surrogate,
    read_records,
    split_files,
)
from smedjan.errors import DataError

__all__ = [
    "KNOWN_COLUMNS",
    "SPLITS",
    "SUFFIXES",
    "Broken",
    "Kind",
    "Message",
    "OnBroken",
    "Row",
    "Source",
    "conversion",
    "left_out",
    "read_rows",
    "row_of",
    "split_files",
    "stream_rows",
]

Kind = Literal["text", "prompt+completion", "messages"]
Message = dict[str, Any]

_ROW_TYPES: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt+completion": ("prompt", "completion"),
    "messages": ("messages",),
}
KNOWN_COLUMNS = {"text", "prompt", "completion", "messages", "tools", "label"}
KNOWN_COLUMNS |= {"chosen", "rejected", *COLUMNS}
"""The columns that say what a row is; a table's others are not even decoded."""
_ONE_TYPE = "give every row `text`, `prompt` + `completion`, or `messages`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One checked row. Of `text`, `prompt` and `completion`, and `messages` only what `kind` says is filled; a
    conversational prompt + completion is `messages`, of which the first `prompt_messages` are the prompt.

    origin   what it was converted from
    """

    kind: Kind
    source: Source
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    prompt_messages: int = 0
    tools: tuple[dict[str, Any], ...] = ()
    origin: Origin | None = None

    @property
    def file(self) -> Path:
        return self.source.file

    @property
    def line(self) -> int:
        return self.source.line

    @property
    def shape(self) -> str:
        """The row type by name; every row of a file has the same one."""
        kind = f"{self.kind} of messages" if self.kind == "prompt+completion" and self.messages else self.kind
        return kind if self.origin is None else f"{self.origin} (as {kind})"

    @property
    def converted(self) -> dict[str, str] | None:
        """What it was converted from, and to."""
        return None if self.origin is None else {"from": self.origin, "to": self.kind}


def read_rows(path: str | PathLike[str], split: str = "train", *, chat: bool = True) -> list[Row]:
    """Every row of a file, or of the `split` of a folder, in order, as `stream_rows` gives them."""
    return list(stream_rows(path, split, chat=chat))


def stream_rows(
    path: str | PathLike[str], split: str = "train", *, chat: bool = True, broken: Broken | None = None
) -> Iterator[Row]:
    """Row by row; a file is itself one split, whichever is asked. `chat`: whether the model has a chat template.

    Raises DataError naming file and line at the first row that is of another type than the row before, and for a file
    without rows; so does `broken`, unless it leaves them out, at one that does not parse, or lacks or empties a field.
    """
    broken = broken or Broken()
    first = None
    for file in data_files(path, split):
        empty = True
        for source, record in read_records(file, KNOWN_COLUMNS, broken):
            try:
                row = row_of(record, source, chat=chat)
            except DataError as error:
                broken(error)
                continue
            first = first or row
            if row.shape != first.shape:
                raise source.error(f"a row of type {row.shape}, but {first.source} is {first.shape}", _ONE_TYPE)
            empty = False
            yield row
        if empty:
            broken.none_left(file)
            raise DataError("holds no row", file=file, remedy="give a file with at least one row")


def conversion(converted: Mapping[str, str] | None) -> str | None:
    """`Row.converted` as a line for the person who gave the rows."""
    return None if converted is None else HOW[converted["from"], converted["to"]]  # type: ignore[index]


def left_out(count: int, first: DataError | None) -> str | None:
    """What `Broken` left out, as a line for the person who gave the rows; None: nothing."""
    if first is None:
        return None
    rows = "1 broken row is left out" if count == 1 else f"{count:,} broken rows are left out; the first"
    return f"{first.file}: {rows}: {first.field}: {first.message}"


def row_of(record: object, source: Source, *, chat: bool = True) -> Row:
    """A parsed record as a Row: its type found by its keys, its fields checked."""
    if not isinstance(record, Mapping):
        raise source.error(f"is {_called(record)}, not an object", 'write one {"prompt": ..., "completion": ...} a row')
    given = {key for key, value in record.items() if value is not None}
    kinds = [kind for kind, keys in _ROW_TYPES.items() if given.issuperset(keys)]
    if origin := origin_of(given, native=bool(kinds)):
        return replace(row_of(convert(record, origin, source, chat=chat), source), origin=origin)
    if len(kinds) != 1:
        raise source.error(*_untyped(given, kinds, list(record)))
    if kinds[0] == "text":
        return Row(kind="text", source=source, text=_text(record["text"], "text", source))
    if kinds[0] == "prompt+completion" and _is_verdict(record.get("label")):
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
    if given & {"prompt", "completion"}:
        lacking = "completion" if "prompt" in given else "prompt"
        return f"lacks `{lacking}`", f"add `{lacking}`, or remove the row"
    found = ", ".join(map(str, keys)) or "none"
    return f"lacks `text`, `prompt` + `completion` and `messages` (keys: {found})", _ONE_TYPE


def _is_verdict(label: object) -> bool:
    """Whether a label says good or bad, as a CSV or a table may write it too."""
    return str(label).lower() in ("true", "false", "0", "1")


def _text(value: object, name: str, source: Source) -> str:
    if not isinstance(value, str):
        raise source.error(f"`{name}` is {_called(value)}, not a string", f"write `{name}` as a string")
    if not value:
        raise source.error(f"`{name}` is empty", f"fill `{name}`, or remove the row")
    if has_surrogate(value):
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
    if isinstance(value, str):
        # So that tools of different schemas fit into one column
        try:
            value = json.loads(value or "[]")
        except (ValueError, RecursionError) as error:
            raise source.error(f"`tools` is not JSON: {error}", "write a list of JSON schemas") from error
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise source.error(f"`tools` is {_called(value)}, not a list of JSON schemas", "write one object a tool")
    return tuple(_plain(tool, "tools", source) for tool in value)


def _plain(value: Any, where: str, source: Source) -> Any:
    """What JSON can say, without the nulls that Arrow puts into structs; a template must not see anything else."""
    if isinstance(value, dict):
        return {str(key): _plain(part, where, source) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part, where, source) for part in value]
    if isinstance(value, str) and has_surrogate(value):
        raise source.error(
            f"`{where}` holds half of a surrogate pair, which is no character", "remove that \\udXXX escape"
        )
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise source.error(f"`{where}` holds {_called(value)}", "keep to what JSON can say")


def _called(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value)) or ("an object" if isinstance(value, Mapping) else f"a {type(value).__name__}")
