"""What a flag is: a field of a dataclass whose annotation, default and metadata say its type, choices, range and help.

    class OptimConfig(Section):
        lr: float | None = field(default=None, metadata={"gt": 0, "help": "peak learning rate"})

Values come as typed ("2e-4") or already converted, and are checked where a config is made: one that exists is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from smedjan.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What the value of one field must be. `type` is int, float, bool, str, Path or tuple (of strings)."""

    type: type[Any]
    required: bool
    default: Any
    """None for "not given", or where `required`."""
    choices: tuple[str, ...]
    ge: float | None
    gt: float | None
    lt: float | None
    help: str


class Section:
    """Converts and checks each field when the dataclass is made."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, flag in flags_of(type(self)).items():
            object.__setattr__(self, name, read(getattr(self, name), flag, f"{self.section}{name}"))


def flags_of(section: type[Any]) -> dict[str, Flag]:
    """The fields of a section that are flags, by name; sections within it are not."""
    hints = get_type_hints(section)
    found: dict[str, Flag] = {}
    for item in fields(section):
        if not item.metadata:
            continue
        hint = hints[item.name]
        if type(None) in get_args(hint):
            (hint,) = (part for part in get_args(hint) if part is not type(None))
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        found[item.name] = Flag(
            type=str if choices else (get_origin(hint) or hint),
            required=item.default is MISSING,
            default=None if item.default is MISSING else item.default,
            choices=choices,
            ge=item.metadata.get("ge"),
            gt=item.metadata.get("gt"),
            lt=item.metadata.get("lt"),
            help=item.metadata["help"],
        )
    return found


def read(value: object, flag: Flag, name: str) -> Any:
    """`value` as the flag's type. A string is read as on the command line: "1e-5" is a number, "a,b" two names."""
    if value is None and flag.default is None and not flag.required:
        return None
    result = _READERS[flag.type](value, name)
    if flag.choices and result not in flag.choices:
        close = nearest(result, flag.choices)
        raise ConfigError(
            f"{result!r} is not one of {', '.join(flag.choices)}",
            field=name,
            remedy=f"did you mean {close}?" if close else "give one of them",
        )
    low = flag.ge is None or result >= flag.ge
    high = flag.lt is None or result < flag.lt
    if not (low and high and (flag.gt is None or result > flag.gt)):
        bounds = ((">=", flag.ge), (">", flag.gt), ("<", flag.lt))
        wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        raise ConfigError(f"{result} is out of range", field=name, remedy=f"give a value {wanted}")
    return result


def _wrong(value: object, name: str, wanted: str) -> ConfigError:
    return ConfigError(f"{value!r} is not {wanted}", field=name, remedy=f"give {wanted}")


def _float(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong(value, name, "a number")
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise _wrong(value, name, "a number") from error
    if not isfinite(number):
        raise _wrong(value, name, "a finite number")
    return number


def _int(value: object, name: str) -> int:
    # Not by way of float, which would round a large seed
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isdecimal() and len(value) < 40:
        return int(value)
    number = _float(value, name)
    if not number.is_integer():
        raise _wrong(value, name, "a whole number")
    return int(number)


def _bool(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise _wrong(value, name, "true or false")


def _str(value: object, name: str) -> str:
    text = str(value) if isinstance(value, PathLike) else value
    if not isinstance(text, str) or not text:
        raise _wrong(value, name, "a string that is not empty")
    return text


def _path(value: object, name: str) -> Path:
    return Path(_str(value, name))


def _names(value: object, name: str) -> tuple[str, ...]:
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or not parts or not all(isinstance(part, str) and part for part in parts):
        raise _wrong(value, name, "a list of names")
    if len(set(parts)) != len(parts):
        raise ConfigError("a name is there twice", field=name, remedy="keep one")
    return tuple(parts)


def listed(names: tuple[str, ...] | None, field: str) -> tuple[str, ...] | None:
    """The names, or of a single @FILE its lines, so that a config holds what was in the file."""
    if names is None or len(names) != 1 or not names[0].startswith("@") or names[0] == "@":
        return names
    file = Path(names[0][1:])
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read: {error}", file=file, field=field, remedy="give @FILE of one a line"
        ) from error
    return _names([line.strip() for line in lines if line.strip()], field)


_READERS: dict[type[Any], Callable[[object, str], Any]] = {
    int: _int,
    float: _float,
    bool: _bool,
    str: _str,
    Path: _path,
    tuple: _names,
}
