"""What is asked of a run: Ctrl-C stops it after the step, a second one at once; SIGUSR1 or a file saves it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Asked:
    """`stop`: after this step. `save`: a checkpoint after this step, as does a file `request`."""

    request: Path
    stop: bool = False
    save: bool = False
    seen: bool = False

    def save_now(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        wanted, self.save, self.seen = self.save, False, self.request.exists()
        return wanted or self.seen

    def saved(self) -> None:
        """A checkpoint is there: who asked by a file sees that it is gone. One that came later stays."""
        if self.seen:
            self.request.unlink(missing_ok=True)


@contextmanager
def asked(request: Path) -> Iterator[Asked]:
    """Within, signals are noted and nothing more. Off the main thread Python takes none: the file alone asks."""
    made = Asked(request)
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
