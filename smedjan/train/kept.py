"""The flags that a run was started with, in its directory: `--resume --out DIR` needs no other, on any machine.

RUN/smedjan/flags.json     as FinetuneConfig.to_dict has them, but for those of one start: out, resume, dry_run
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from smedjan.checkpoint.atomic import write_atomic
from smedjan.errors import ConfigError
from smedjan.train.config import FinetuneConfig, named, read_toml

OF_ONE_START = ("out", "resume", "dry_run")


def file_of(out: Path) -> Path:
    return out / "smedjan" / "flags.json"


def keep(config: FinetuneConfig) -> None:
    """Anew at each start: paths and the backend are those of the last machine."""
    assert config.out is not None
    flags = {name: value for name, value in config.to_dict().items() if name not in OF_ONE_START}
    write_atomic(file_of(config.out), (json.dumps(flags, indent=2) + "\n").encode())


def configured(path: str | PathLike[str] | None, overrides: Mapping[str, object]) -> FinetuneConfig:
    """The config of a TOML file and flags over it; where they resume, over those that the run was started with."""
    in_file = {} if path is None else named(read_toml(Path(path)), file=Path(path))
    asked = {**in_file, **named(overrides, file=None)}
    out = asked.get("out")
    found = file_of(Path(str(out))) if asked.get("resume") in (True, "true") and out else None
    return FinetuneConfig.from_toml(path, overrides, kept=found if found is not None and found.is_file() else None)


def check_same(config: FinetuneConfig) -> None:
    """An error that names the first flag which decides numbers and is another one than the run was started with.

    A directory of an older version keeps none: what its state says is compared all the same."""
    assert config.out is not None
    file = file_of(config.out)
    if not file.is_file():
        return
    began = FinetuneConfig.from_toml(None, {"out": str(config.out)}, kept=file)
    was, now = (dict(_flat(each.decided())) for each in (began, config))
    for name in dict.fromkeys([*was, *now]):
        if was.get(name) != now.get(name):
            raise ConfigError(
                f"is {_shown(now.get(name))}, and the run was started with another, {_shown(was.get(name))}",
                file=file,
                field=name,
                remedy=f"leave --{name.replace('_', '-')} out to go on as it was started, or start a new --out",
            )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: object) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return f"{value}".lower()
    return ",".join(map(str, value)) if isinstance(value, list) else f"{value}"
