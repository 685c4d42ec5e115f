"""`follow`: the page of a run, written again as its log grows. A file that reloads itself: no server, no script."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from smedjan.checkpoint.lock import holder
from smedjan.report.html import write_report
from smedjan.report.run_dir import from_run

REFRESH_S = 5
"""After which a browser loads the page again."""

LOOK_S = 1.0
"""Between two looks at the log."""


def follow(run: Path, target: Path, *, live: bool, look: float = LOOK_S) -> Iterator[Path]:
    """Writes the page, and gives its path each time it was written. With `live`, again whenever the log has grown,
    until no process writes the run; the last page is an ordinary one, which no longer reloads."""
    log = run / "smedjan" / "log.jsonl"
    seen = None
    while True:
        # In this order: a run that ends between the two is read whole, and once more.
        goes_on = live and holder(run) is not None
        grown = _size(log)
        if not goes_on:
            yield write_report(target, from_run(run))
            return
        if grown not in (seen, 0):
            seen = grown
            yield write_report(target, from_run(run, live=True), refresh=REFRESH_S)
        time.sleep(look)


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except FileNotFoundError:  # the run has begun, and not yet written it
        return 0
