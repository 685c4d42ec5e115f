"""`smedjan doctor`; what it finds out is in doctor.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from smedjan.cli.output import COMMON, Common, Outcome
from smedjan.errors import BackendError, nearest

if TYPE_CHECKING:
    from smedjan.cli.doctor import BackendStatus


def doctor(*, common: Common = COMMON) -> Outcome:
    """What is installed, which backends run here, and what to do about those that do not.

    Example: smedjan doctor
    """
    from smedjan.cli.doctor import diagnose
    from smedjan.runtime.select import NEEDS

    if common.backend not in ("auto", *NEEDS):
        close = nearest(common.backend, set(NEEDS))
        raise BackendError(
            f"unknown backend {common.backend!r}",
            field="backend",
            remedy=f"did you mean {close}?" if close else f"choose one of {', '.join(NEEDS)}",
        )
    made = diagnose()
    found = [status for status in made.backends if common.backend in ("auto", status.name)]
    width = max(len(status.name) for status in found)
    lines = []
    for status in found:
        lines.append(f"{status.name.ljust(width)}  {'yes' if status.usable else 'no '}  {status.reason}")
        if status.remedy:
            lines.append(f"{' ' * width}       {status.remedy}")
    auto = made.auto
    if common.backend == "auto":
        lines.append(f"without --backend {auto.name} runs: {auto.reason}" if auto.usable else _nothing(auto))
    return Outcome(
        fields={"backends": [asdict(status) for status in found], "auto": asdict(auto)}, text="\n".join(lines)
    )


def _nothing(auto: BackendStatus) -> str:
    return f"without --backend {auto.name} would run, and cannot: {auto.reason}; {auto.remedy}"
