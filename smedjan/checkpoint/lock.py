"""One process writes a run, and others may ask it for a checkpoint.

RUN/smedjan/run.lock       {pid, host, since} of the process that writes the run: held by flock while it lives
RUN/smedjan/save.request   somebody wants a checkpoint; the run deletes it when one is there

The kernel lets go of the lock with the process, however that ends: a file that a kill left behind holds nobody back,
and a process that took over the number of a dead one is never mistaken for it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from smedjan.checkpoint.atomic import write_errors
from smedjan.checkpoint.run_dir import INNER
from smedjan.errors import CheckpointError, ConfigError
from smedjan.models.config import read_json_object

LOCK, REQUEST = "run.lock", "save.request"

PATIENCE_S = 0.5
"""Of a process that wants the lock: somebody who only looks whether it is held has it for an instant."""

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def request_file(run: Path) -> Path:
    return run / INNER / REQUEST


class RunLock:
    """Within it this process alone writes `run`. A directory that is no run yet is left as it is until `acquire`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._file: int | None = None
        self._new = False

    def __enter__(self) -> RunLock:
        if (self.run / INNER).is_dir():
            self.acquire()
        else:
            self._new = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            # First the name, then the lock: who opened it before finds below that the name is another file's.
            (self.run / INNER / LOCK).unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def acquire(self) -> None:
        """Takes the lock, if it is not taken here already; an error that names the process which has it."""
        if self._file is not None:
            return
        path = self.run / INNER / LOCK
        until = time.monotonic() + PATIENCE_S
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try(path):
                if time.monotonic() > until:
                    raise ConfigError(
                        f"{_shown(_content(path))} writes this run",
                        file=self.run,
                        field="out",
                        remedy="wait for it or stop it, or give another --out",
                    )
                time.sleep(0.01)
            request_file(self.run).unlink(missing_ok=True)  # of a process that is gone
            if self._new and any(entry.name != LOCK for entry in path.parent.iterdir()):
                raise ConfigError(
                    "exists already: another process has just written it",
                    file=self.run,
                    field="out",
                    remedy="give --resume, or another directory",
                )

    def _try(self, path: Path) -> bool:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _flock(file, fcntl.LOCK_EX, path) or not _names(path, file):
                os.close(file)
                return False
            since = datetime.now(UTC).isoformat(timespec="seconds")
            content = {"pid": os.getpid(), "host": platform.node(), "since": since}
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(content).encode() + b"\n", 0)
        except BaseException:
            with suppress(OSError):
                os.close(file)
            raise
        self._file = file
        return True


def holder(run: Path) -> dict[str, Any] | None:
    """{pid, host, since} of the process that writes `run`, None where there is none."""
    path = run / INNER / LOCK
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return None if _flock(file, fcntl.LOCK_SH, path) else _content(path)
    finally:
        os.close(file)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was asked for."""

    checkpoint: Path
    step: int
    pid: int


def ask_checkpoint(run: Path, *, timeout: float) -> Saved:
    """Asks the process that writes `run` for a checkpoint after its step, and waits until it is there."""
    found = holder(run)
    if found is None:
        raise CheckpointError(
            "no process writes this run: it has ended or was killed",
            file=run,
            remedy="smedjan finetune --resume goes on from its last checkpoint",
        )
    request, until = request_file(run), time.monotonic() + timeout
    with write_errors(request):
        request.touch()
    while request.exists():
        # In this order: a run may save, answer and end between two looks.
        if holder(run) is None and request.exists():
            request.unlink(missing_ok=True)
            raise CheckpointError(
                "the run ended before it was asked",
                file=run,
                remedy="its last checkpoint is the one that it ended with",
            )
        if time.monotonic() > until:
            request.unlink(missing_ok=True)
            raise CheckpointError(
                f"no checkpoint within {timeout:g} s", file=run, remedy="a step may take longer: give --timeout"
            )
        time.sleep(0.02)
    pointer = read_json_object(run / INNER / "latest.json", CheckpointError)
    return Saved(checkpoint=run / pointer["path"], step=pointer["step"], pid=int(found.get("pid", 0)))


def _flock(file: int, how: int, path: Path) -> bool:
    """Whether the lock was free."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as cause:
        if cause.errno not in _UNSUPPORTED:
            raise
        raise CheckpointError(
            "the file system has no locks (flock)", file=path, remedy="write the run to another one"
        ) from cause
    return True


def _names(path: Path, file: int) -> bool:
    """Whether `path` is still the name of the open file."""
    try:
        named, opened = path.stat(), os.fstat(file)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _content(path: Path) -> dict[str, Any]:
    """What its holder wrote; empty in the instant before it did."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _shown(found: dict[str, Any]) -> str:
    if not found:
        return "another process"
    return f"process {found.get('pid')} on {found.get('host')} (since {found.get('since')})"
