"""Files and directories that are there whole or not at all, whatever kills the process.

Everything is written under a temporary name beside its destination, fsynced and renamed. A kill leaves at most names
that start with `.` and end in `.tmp`, which no reader looks at and `remove_stale` deletes.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from smedjan.errors import CheckpointError, SmedjanError

_FULL = {errno.ENOSPC, errno.EDQUOT}


def temporary(path: Path) -> Path:
    """A fresh hidden name beside `path`, from which a rename is atomic."""
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def remove_stale(directory: Path) -> None:
    """Delete what a killed writer left in `directory`. Only its one writer may call this."""
    for entry in directory.glob(".*.tmp"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Delete a directory so that no kill leaves half of it under its name."""
    doomed = temporary(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Errors of the file system while `path` is written, as one line for the user."""
    try:
        yield
    except OSError as cause:
        if cause.errno in _FULL:
            raise CheckpointError(
                "the disk is full, nothing was kept", file=path, remedy="free some space or write to another disk"
            ) from cause
        raise CheckpointError(
            f"cannot be written: {cause.strerror or cause}", file=path, remedy="check the path and its rights"
        ) from cause


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable (nothing to do where directories cannot be opened, as on Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write `content`, or what the function writes to the file it is given, to `path`."""
    partial = temporary(path)
    with write_errors(path):
        try:
            with partial.open("xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """A CheckpointError where `path` is a file or a directory that holds something."""
    with write_errors(path):
        is_dir = path.is_dir()
        holds = is_dir and any(path.iterdir())
    if is_dir:
        if holds:
            raise CheckpointError(
                "the destination exists and is not empty", file=path, remedy="give another path, or remove it first"
            )
    elif os.path.lexists(path):
        raise CheckpointError("the destination is a file", file=path, remedy="give the path of a new directory")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to fill, which becomes `path` if the block succeeds and is removed if it does not."""
    # Not Path.resolve, for which links in a circle are a RuntimeError.
    destination = Path(os.path.realpath(path))
    refuse_existing(destination)
    missing = [parent for parent in destination.parents if not parent.exists()]
    partial = temporary(destination)
    done = False
    try:
        with write_errors(path):
            destination.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
        try:
            yield partial
        except SmedjanError as error:
            # The user knows the destination, not our temporary name.
            if error.file is not None:
                error.file = error.file.replace(str(partial), str(path))
            raise
        except OSError as cause:
            # Other errors of the block are its own; a full disk is ours wherever it shows.
            if cause.errno not in _FULL:
                raise
            with write_errors(path):
                raise
        with write_errors(path):
            _sync_tree(partial)
            if destination.is_dir():
                destination.rmdir()
            partial.rename(destination)
            sync_directory(destination.parent)
        done = True
    finally:
        if not done:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in missing:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            handle = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(folder))
