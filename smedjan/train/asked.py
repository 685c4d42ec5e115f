"""What signals ask of a run: Ctrl-C stops it after the step, a second one at once; SIGUSR1 saves a checkpoint.

Of several processes any one may be asked, and all do it after the same step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from smedjan.backends.collective import Collective

ECHO = 5.0
"""Seconds within which a launcher passes Ctrl-C on."""


@dataclass
class Asked:
    """`stop`: after this step. `save`: a checkpoint after this step."""

    stop: bool = False
    save: bool = False

    def agreed(self, group: Collective) -> tuple[bool, bool]:
        """(stop, save) as any process of the group was asked since the last call."""
        mine, self.save = (self.stop, self.save), False
        stop, save = (any(each) for each in zip(*group.exchange(mine), strict=True))
        return stop, save


@contextmanager
def asked(*, several: bool = False) -> Iterator[Asked]:
    """Within, signals are noted and nothing more. Off the main thread, where Python takes none, nothing is asked.

    Ctrl-C reaches one of `several` processes twice, from the terminal and from the launcher: what follows at once is
    no second one.
    """
    made, first = Asked(), 0.0
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
