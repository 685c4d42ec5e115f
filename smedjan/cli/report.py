"""`smedjan report RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome
from smedjan.errors import ConfigError


def report(
    run: Annotated[Path, Parameter(help="run directory")],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="file to write (default: report.html in the run directory)")] = None,
    live: Annotated[
        bool, Parameter(negative=(), help="write it again while the run goes on; the page reloads itself")
    ] = False,
    common: Common = COMMON,
) -> Outcome:
    """Write the page of a run: one HTML file that needs nothing else.

    Example: smedjan report run --out report.html
    """
    from smedjan.report.live import follow

    if not run.is_dir():
        raise ConfigError("is no directory", file=run, remedy="give the --out of smedjan finetune")
    target = out or run / "report.html"
    try:
        for number, _ in enumerate(follow(run, target, live=live)):
            if live and number == 0:
                common.note(f"{target}: open it; it is written again until the run ends")
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", file=target, field="out", remedy="check it"
        ) from error
    return Outcome(fields={"report": target}, text=str(target))
