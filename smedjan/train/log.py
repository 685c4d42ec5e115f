"""`log.jsonl` of a run: one object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from smedjan.checkpoint.atomic import write_atomic, write_errors

Event = dict[str, Any]


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunLog:
    """Appends; lines past the step resumed from are dropped first, `again` of them steps. Of several processes one
    `speaks`."""

    def __init__(self, path: Path, start: int, on_step: Callable[[Event], None] | None, *, speaks: bool = True) -> None:
        self.path, self.on_step, self.speaks = path, on_step, speaks
        self.again = 0
        if not speaks:
            return
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    event = json.loads(line)
                except ValueError:  # the line that a kill cut short
                    continue
                if event.get("step", 0) <= start:
                    kept.append(line)
                elif "loss" in event:
                    self.again += 1
        write_atomic(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, event: Event) -> None:
        if not self.speaks:
            return
        with write_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps({key: _plain(value) for key, value in event.items()}, allow_nan=False) + "\n")
        if self.on_step is not None:
            self.on_step(event)


def _plain(value: Any) -> Any:
    """JSON has no word for a number that is not finite: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
