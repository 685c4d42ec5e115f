"""Work on many files at once: jobs on threads of which one failure stops all, and sha256 of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from smedjan.errors import CheckpointError

T = TypeVar("T")
Go = Callable[[], None]
"""Called by a job between two pieces of its work: raises where the work is no longer wanted."""

THREADS = min(4, os.cpu_count() or 1)
"""sha256 takes most of a copy's time and runs without the interpreter's lock; more threads would wait for the disk."""

_CHUNK = 1 << 20


@contextmanager
def started(jobs: Sequence[Callable[[Go], T]], threads: int = THREADS) -> Iterator[Callable[[], list[T]]]:
    """Jobs on threads; the block gets a function that waits for their results, or raises the error of one of them.

    However the block ends, no job runs on after it: each stops at its next `go()`.
    """
    stopped = False

    def go() -> None:
        if stopped:
            raise CancelledError

    def run(job: Callable[[Go], T]) -> T:
        nonlocal stopped
        go()
        try:
            return job(go)
        except BaseException:
            stopped = True
            raise

    def results() -> list[T]:
        wait(futures)
        for error in (future.exception() for future in futures):
            if error is not None and not isinstance(error, CancelledError):
                raise error
        return [future.result() for future in futures]

    pool, futures = ThreadPoolExecutor(threads), list[Future[T]]()
    try:
        for job in jobs:
            futures.append(pool.submit(run, job))
        yield results
    finally:
        stopped = True
        pool.shutdown(cancel_futures=True)
        # An interrupt while a thread starts leaves that thread out of what shutdown waits for.
        wait([future for future in futures if not future.cancelled()])


def sha256_of_file(file: Path, go: Go = lambda: None) -> str:
    """The hexadecimal sha256 of a file's bytes."""
    digest, buffer = sha256(), memoryview(bytearray(_CHUNK))
    try:
        with file.open("rb", buffering=0) as raw:
            while count := raw.readinto(buffer):
                digest.update(buffer[:count])
                go()
    except OSError as cause:
        raise CheckpointError(f"cannot be read: {cause.strerror}", file=file, remedy="check the path") from cause
    return digest.hexdigest()


def hashing(files: Sequence[Path]) -> Sequence[Callable[[Go], str]]:
    """A job for each file that gives its sha256."""
    return [partial(sha256_of_file, file) for file in files]
