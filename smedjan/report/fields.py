"""A JSON object of which each field is read once, with its type; a wrong one is named by file and path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smedjan.errors import DataError

_REMEDY = "write the file again, or delete it to leave it out of the report"


@dataclass(frozen=True)
class Fields:
    """`data`, found in `file` at `where` (empty at the top)."""

    data: dict[str, object]
    file: Path
    where: str

    @classmethod
    def of(cls, value: object, file: Path, where: str) -> Fields:
        if not isinstance(value, dict):
            raise DataError(
                f"an object is expected, not {_kind(value)}", file=file, field=where or None, remedy=_REMEDY
            )
        return cls(value, file, where)

    def error(self, key: str, problem: str) -> DataError:
        return DataError(problem, file=self.file, field=self._path(key), remedy=_REMEDY)

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "a list of texts")
        return tuple(str(value) for value in values)

    def boolean(self, key: str) -> bool:
        value = self.data.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def number(self, key: str) -> float:
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def integer(self, key: str) -> int:
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number")
        return value

    def integer_or_none(self, key: str) -> int | None:
        return self.integer(key) if self.has(key) else None

    def share(self, key: str) -> float:
        value = self.number(key)
        if not 0 <= value <= 1:
            raise self._wrong(key, "a share between 0 and 1")
        return value

    def interval(self, key: str) -> tuple[float, float] | None:
        if not self.has(key):
            return None
        low, high = self._pair(self.data[key], key)
        return low, high

    def pairs(self, key: str) -> tuple[tuple[float, float], ...]:
        return tuple(self._pair(value, f"{key}[{index}]") for index, value in enumerate(self._list(key)))

    def rows(self, key: str) -> Iterator[Fields]:
        for index, value in enumerate(self._list(key)):
            yield Fields.of(value, self.file, self._path(f"{key}[{index}]"))

    def child(self, key: str) -> Fields | None:
        return Fields.of(self.data[key], self.file, self._path(key)) if self.has(key) else None

    def shown(self, key: str) -> str:
        """Any scalar or list of scalars as a reader would write it; empty where absent."""
        return _show(self.data.get(key))

    def flat(self, key: str) -> Iterator[tuple[str, str]]:
        """(dotted name, value) of every leaf under `key`."""
        child = self.child(key)
        if child is None:
            return
        for name in child.data:
            if isinstance(child.data[name], dict):
                yield from ((f"{name}.{inner}", value) for inner, value in child.flat(name))
            else:
                yield name, child.shown(name)

    def _list(self, key: str) -> list[object]:
        value = self.data.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value

    def _pair(self, value: object, key: str) -> tuple[float, float]:
        if isinstance(value, list) and len(value) == 2:
            low, high = value
            if _is_number(low) and _is_number(high):
                return float(low), float(high)
        raise self.error(key, f"a pair of numbers is expected, not {_kind(value)}")

    def _wrong(self, key: str, wanted: str) -> DataError:
        if not self.has(key):
            return self.error(key, "is missing")
        return self.error(key, f"{wanted} is expected, not {_kind(self.data[key])}")

    def _path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_show(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
