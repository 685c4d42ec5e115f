"""What is asked of a run: Ctrl-C stops it after the step, a second one at once; SIGUSR1 or a file saves it.

Of several processes any one may be asked, and all do it after the same step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smedjan.backends.collective import Collective

ECHO = 5.0
"""Seconds within which a launcher passes Ctrl-C on."""


@dataclass
class Asked:
    """`stop`: after this step. `save`: a checkpoint after this step, as does a file `request`."""

    request: Path
    stop: bool = False
    save: bool = False
    seen: bool = False

    def agreed(self, group: Collective) -> tuple[bool, bool]:
        """(stop, save) as any process of the group was asked since the last call."""
        self.seen = self.request.exists()
        mine, self.save = (self.stop, self.save or self.seen), False
        stop, save = (any(each) for each in zip(*group.exchange(mine), strict=True))
        return stop, save

    def saved(self) -> None:
        """A checkpoint is there: who asked by a file sees that it is gone. One that came later stays."""
        if self.seen:
            self.request.unlink(missing_ok=True)


@contextmanager
def asked(request: Path, *, several: bool = False) -> Iterator[Asked]:
    """Within, signals are noted and nothing more. Off the main thread Python takes none: the file alone asks.

    Ctrl-C reaches one of `several` processes twice, from the terminal and from the launcher: what follows at once is
    no second one.
    """
    made, first = Asked(request), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield made
        return

    def stop(signum: int, frame: Any) -> None:
        nonlocal first
        if not made.stop:
            made.stop, first = True, time.monotonic()
        elif time.monotonic() - first > ECHO:
            raise KeyboardInterrupt
        if not several:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    def save(signum: int, frame: Any) -> None:
        made.save = True

    handlers = {signal.SIGINT: stop}
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        handlers[signal.SIGUSR1] = save
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield made
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
