"""What signals ask of a run: Ctrl-C stops it after the step, a second one at once; SIGUSR1 saves a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Asked:
    """`stop`: after this step. `save`: a checkpoint after this step."""

    stop: bool = False
    save: bool = False

    def save_now(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        wanted, self.save = self.save, False
        return wanted


@contextmanager
def asked() -> Iterator[Asked]:
    """Within, signals are noted and nothing more. Off the main thread, where Python takes none, nothing is asked."""
    made = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield made
        return

    def stop(signum: int, frame: Any) -> None:
        made.stop = True
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
