"""Which machine took which steps of a run: the legs of its log, each of which begins with a header.

Steps that a later leg took again, since no checkpoint had them, are that leg's: the log has dropped the earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smedjan.report.fields import Fields
from smedjan.report.run_dir import log_rows


@dataclass(kw_only=True)
class Leg:
    """One start of a run, or one resume. None, or empty, is what an older version did not write.

    machine, system    the host's own name, without its domain; operating system and processor
    began, ended       its header and its last step, in UTC
    steps              those that it took and that were kept, from `first_step` to `last_step`; 0: none was
    again              of them, those that the leg before had taken past its last checkpoint
    first_loss, last_loss   None also where one was not finite
    """

    machine: str | None = None
    system: str | None = None
    backend: str | None = None
    device: str | None = None
    exact: bool | None = None
    plan_hash: str | None = None
    processes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    began: str | None = None
    ended: str | None = None
    steps: int = 0
    again: int = 0
    first_step: int | None = None
    last_step: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None

    def add(self, row: Fields) -> None:
        """A step that was logged."""
        step, loss = row.integer("step"), row.number_or_none("loss")
        if self.steps == 0:
            self.first_step, self.first_loss = step, loss
        self.steps += 1
        self.last_step, self.last_loss, self.ended = step, loss, _text(row, "at")


@dataclass(frozen=True, kw_only=True)
class History:
    """`steps` were taken, of `total_steps`."""

    run_dir: Path
    steps: int
    total_steps: int | None
    legs: list[Leg]


def history(run: Path) -> History:
    legs: list[Leg] = []
    total = None
    for row in log_rows(run / "smedjan" / "log.jsonl"):
        if row is None:  # the line that a kill cut short, or that is being written
            continue
        if head := row.child("header"):
            legs.append(_leg(head))
            steps = head.child("steps")
            total = (steps and steps.integer_or_none("total")) or total
        elif "loss" in row.data:
            if not legs:
                legs.append(Leg())
            legs[-1].add(row)
    return History(run_dir=run, steps=sum(leg.steps for leg in legs), total_steps=total, legs=legs)


def _leg(head: Fields) -> Leg:
    machine, steps = head.child("machine"), head.child("steps")
    texts: dict[str, Any] = {key: _text(head, key) for key in ("backend", "device", "plan_hash", "began")}
    return Leg(
        machine=_text(machine, "name"),
        system=_text(machine, "system"),
        exact=head.boolean("exact") if head.has("exact") else None,
        processes=head.integer_or_none("processes"),
        versions=dict(head.flat("versions")),
        again=(steps and steps.integer_or_none("again")) or 0,
        **texts,
    )


def _text(fields: Fields | None, key: str) -> str | None:
    return fields.text(key) if fields is not None and fields.has(key) else None
