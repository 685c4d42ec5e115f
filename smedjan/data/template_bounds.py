"""What one rendering of a chat template may do: rounds, characters and seconds, each weighed before it is spent.

A template comes with a model and is code of a stranger. Jinja's sandbox keeps it from Python's internals, not from
taking all time and memory: `{{ 'x' * 10**10 }}`, ten nested loops, a string that doubles itself. `FILTERS` and
`METHODS` say, for each filter and string method that can return far more than it was given, how much that will be.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jinja2.sandbox import SecurityError

MAX_CHARACTERS = 1 << 27
"""Characters and list items that one rendering may make, intermediate ones included."""
MAX_STEPS = 1 << 22
"""Loop rounds, calls and filters of one rendering."""
MAX_SECONDS = 60.0
"""What stops a template that stays below the other bounds with every step a dear one."""
MAX_INTEGER_BITS = 1 << 12
_MAX_INDENT = 1 << 10

Span = tuple[int, int]


@dataclass
class Run:
    """One rendering: the text so far, the `{% generation %}` spans in it, and what it has used of the bounds."""

    blocks: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    characters: int = 0
    steps: int = 0
    until: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)

    def charge(self, characters: int) -> None:
        self.characters += characters
        if self.characters > MAX_CHARACTERS:
            raise SecurityError(f"it makes more than {MAX_CHARACTERS} characters")

    def step(self, characters: int = 0) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.until:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")
        self.charge(characters)


RUN: ContextVar[Run] = ContextVar("run")
"""The rendering under way."""


def weigh(value: Any, pad: int = 0) -> None:
    """Charge what `value` is long as text, its items included; `pad` characters more for each level that it nests."""
    run = RUN.get()
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        item, indent = stack.pop()
        if isinstance(item, str):
            run.charge(len(item) + indent)
        elif isinstance(item, dict):
            run.step(indent)
            stack += [(part, indent + pad) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            run.step(indent)
            stack += [(part, indent + pad) for part in item]
        else:
            run.charge(1 + indent)


def made(value: Any) -> Any:
    """Charge a result that is there already, so that what is kept of many is bounded."""
    RUN.get().charge(length(value))
    return value


def weigh_format(form: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge what `%` or `str.format` can make: every width written in `form` or given by an argument, and every
    argument once for each field."""
    run = RUN.get()
    for digits in re.findall(r"\d+", form):
        run.charge(int(digits) if len(digits) < 12 else MAX_CHARACTERS + 1)
    before = run.characters
    weigh([*args, *kwargs.values()])
    run.charge((run.characters - before) * (form.count("%") + form.count("{")))
    widths = form.count("*") + len(re.findall(r"\{[^{}]*\{", form))
    if widths:
        run.charge(widths * sum(abs(item) for item in _integers([*args, *kwargs.values()])))


def _integers(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, int):
            yield value
        elif isinstance(value, list | tuple | dict):
            yield from _integers(value.values() if isinstance(value, dict) else value)


def length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def listed(items: Any) -> Any:
    """Something with a length: a generator can be gone through only once."""
    return items if isinstance(items, str | list | tuple | dict) else list(items)


def _weigh_replace(text: str, old: Any, new: Any, *_: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        RUN.get().charge(len(text) + text.count(old) * len(new))


def _weigh_join(items: Any, separator: Any = "", *_: Any, **__: Any) -> None:
    weigh(items)
    RUN.get().charge(len(items) * len(str(separator)))


def _weigh_sum(items: Any, *_: Any, start: Any = 0, **__: Any) -> None:
    weigh(items)
    # Lists are added one after the other, each time into a new one.
    RUN.get().charge(0 if isinstance(start, int | float) else len(items) * sum(map(length, items)))


def _weigh_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    size = width if isinstance(width, int) else len(str(width))
    RUN.get().charge(len(str(text)) + (str(text).count("\n") + 1) * size)


def _weigh_json(value: Any, ensure_ascii: Any = False, indent: Any = None, *_: Any, **__: Any) -> None:
    size = indent if isinstance(indent, int) else len(str(indent or ""))
    if size > _MAX_INDENT:
        raise SecurityError(f"tojson indents by {size}")
    weigh(value, pad=size)


def _weigh_translate(text: str, table: Any) -> None:
    sizes = [len(part) for part in table.values() if isinstance(part, str)] if isinstance(table, dict) else []
    RUN.get().charge(len(text) * max([1, *sizes]))


def _weigh_expandtabs(text: str, size: Any = 8) -> None:
    RUN.get().charge(len(text) + text.count("\t") * size if isinstance(size, int) else len(text))


def _weigh_wrap(text: Any, *args: Any, **kwargs: Any) -> None:
    marks = [len(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, str)]
    RUN.get().charge(len(str(text)) * max([1, *marks]))


def _weigh_width(_: Any, *args: Any, **kwargs: Any) -> None:
    """Filters and methods that pad up to a width, or make as many parts as told."""
    RUN.get().charge(sum(abs(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, int)))


def _weigh_values(value: Any, *_: Any, **__: Any) -> None:
    weigh(value)


FILTERS: dict[str, Callable[..., None]] = {
    "batch": _weigh_width,
    "center": _weigh_width,
    "format": lambda form, *args, **kwargs: weigh_format(str(form), args, kwargs),
    "indent": _weigh_indent,
    "join": _weigh_join,
    "pprint": _weigh_values,
    "replace": _weigh_replace,
    "round": _weigh_width,
    "slice": _weigh_width,
    "string": _weigh_values,
    "sum": _weigh_sum,
    "tojson": _weigh_json,
    "urlencode": _weigh_values,
    "wordwrap": _weigh_wrap,
    "xmlattr": _weigh_values,
}
METHODS: dict[str, Callable[..., None]] = {
    "center": _weigh_width,
    "expandtabs": _weigh_expandtabs,
    "join": lambda separator, items: _weigh_join(items, separator),
    "ljust": _weigh_width,
    "replace": _weigh_replace,
    "rjust": _weigh_width,
    "translate": _weigh_translate,
    "zfill": _weigh_width,
}
