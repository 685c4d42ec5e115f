"""`smedjan run history DIR`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome, table
from smedjan.errors import ConfigError

if TYPE_CHECKING:
    from smedjan.report.history import Leg

HEAD = ("steps", "machine", "backend", "device", "began (UTC)", "ended", "first loss", "last loss", "versions")


def history(
    run: Annotated[Path, Parameter(help="run directory: the --out of smedjan finetune")],
    /,
    *,
    common: Common = COMMON,
) -> Outcome:
    """Which machine, backend and versions took which steps of a run, and when. A leg begins at a start or a resume.

    Example: smedjan run history run
    """
    from smedjan.report import history as made

    if not run.is_dir():
        raise ConfigError("is no directory", file=run, remedy="give the --out of smedjan finetune")
    found = made.history(run)
    of = "" if found.total_steps is None else f" of {found.total_steps:,}"
    count = len(found.legs)
    lines = [f"{run}: {found.steps:,}{of} steps in {count} leg{'' if count == 1 else 's'}"]
    lines.append(table(HEAD, [_row(leg) for leg in found.legs]))
    return Outcome(fields=vars(found), text="\n".join(lines))


def _row(leg: Leg) -> tuple[str, ...]:
    libraries = (f"{name} {version}" for name, version in leg.versions.items() if name != "python")
    return (
        _steps(leg),
        leg.machine or "unknown",
        leg.backend or "unknown",
        leg.device or "unknown",
        _when(leg.began),
        _when(leg.ended),
        _loss(leg.first_loss),
        _loss(leg.last_loss),
        ", ".join(libraries),
    )


def _steps(leg: Leg) -> str:
    if leg.steps == 0:
        return "none kept"
    again = f" ({leg.again:,} again)" if leg.again else ""
    return f"{leg.first_step:,}-{leg.last_step:,}{again}"


def _when(text: str | None) -> str:
    if text is None:
        return ""
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
