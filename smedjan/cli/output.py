"""What a command gives back, and how it is printed: text, or one JSON object in the envelope of INTERFACE.md."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from smedjan.errors import ConfigError

SCHEMA = 1
"""Of the JSON: rises when a key goes away or changes its meaning; new keys do not raise it."""

LIBRARIES = ("smedjan", "torch", "transformers", "triton", "mlx")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Common:
    """The flags that every verb has."""

    json: Annotated[
        bool, Parameter(negative=(), show_default=False, help="print one JSON object on stdout, logs on stderr")
    ] = False
    quiet: Annotated[bool, Parameter(negative=(), show_default=False, help="print no progress and no notes")] = False
    backend: Annotated[
        str, Parameter(help="auto, torch_reference (exact), cpu_native, cuda_triton or mlx_metal (fast)")
    ] = "auto"
    interpret: Annotated[
        bool,
        Parameter(
            negative=(),
            show_default=False,
            help="cuda_triton without a GPU: Triton's interpreter runs the very launches, slowly",
        ),
    ] = False

    def __post_init__(self) -> None:
        if not self.interpret:
            return
        if self.backend != "cuda_triton":
            raise ConfigError("is for Triton's kernels", field="interpret", remedy="give --backend cuda_triton too")
        # Before anything imports triton, which reads this once.
        os.environ["TRITON_INTERPRET"] = "1"

    def note(self, text: str) -> None:
        """A line for the person who waits, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


COMMON = Common()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`fields` are the JSON keys, `text` is what is printed without --json. Not `ok`: the exit code is 1."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    ok: bool = True


def envelope(command: str, ok: bool, fields: Mapping[str, Any], error: Mapping[str, Any] | None = None) -> str:
    """One line of JSON. Keys of the envelope that the command knows (`backend`, ...) come from `fields`."""
    from smedjan.cli.doctor import installed

    made: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "ok": ok,
        "versions": {name: found for name in LIBRARIES if (found := installed(name)) is not None},
        "backend": None,
        "device": None,
        "exact": None,
        "plan_hash": None,
        "error": error,
    }
    return as_json({**made, **{key: value for key, value in fields.items() if key != "versions"}})


def as_json(value: Any) -> str:
    """JSON on one line; a number that is not finite is null, since JSON has no word for it."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns side by side, two blanks between them."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows])
    return "\n".join(line.rstrip() for line in lines)


def rendered(made: Any, *, width: int) -> str:
    """What rich makes of it: coloured on a terminal, plain in a pipe, no line wrapped before `width`."""
    from rich.console import Console

    out, colours = StringIO(), sys.stdout.isatty()
    Console(file=out, width=width, force_terminal=colours, no_color=not colours, highlight=False).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
