"""Bytes as people write them, and whether the disk has them. Decimal units, as the hub and disk makers count."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from smedjan.errors import CheckpointError, ConfigError

_UNITS = {"": 1, "B": 1} | {letter + end: 1000**power for power, letter in enumerate("KMGT", 1) for end in ("", "B")}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?B?)", re.IGNORECASE)


def parse_size(text: str | int, field: str) -> int:
    """Bytes of "5GB", "200 MB" or a number of bytes."""
    found = _SIZE.fullmatch(str(text).strip())
    if found is None or found[2].upper() not in _UNITS or (size := int(float(found[1]) * _UNITS[found[2].upper()])) < 1:
        raise ConfigError(f"is {text!r}", field=field, remedy="give a size such as 5GB or 200MB")
    return size


def format_size(size: int) -> str:
    """Three digits and a unit: 1.23 GB."""
    value, unit = float(size), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def free_bytes(folder: Path) -> int:
    """What is free on the disk on which `folder` is, or will be made."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(there).free


def require_space(folder: Path, need: int, what: str) -> None:
    """A CheckpointError where `need` bytes do not fit on the disk of `folder`."""
    if need > (free := free_bytes(folder)):
        raise CheckpointError(
            f"{what} takes {format_size(need)}, the disk has {format_size(free)} free",
            file=folder,
            remedy=f"free {format_size(need - free)}, or use another disk",
        )
