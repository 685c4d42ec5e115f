"""A file or a directory is there whole or not at all: after an error, a full disk, or a kill."""

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from smedjan.checkpoint.atomic import new_directory, remove_stale, write_atomic
from smedjan.errors import CheckpointError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fills_the_disk(file: BinaryIO) -> None:
    """A real ENOSPC from the kernel, after some bytes are written."""
    file.write(b"half")
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        write_atomic(path, fills_the_disk)
    assert caught.value.file == str(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_disk_that_fills_at_fsync_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_atomic(tmp_path / "a", b"x")
    with pytest.raises(CheckpointError, match="the disk is full"), new_directory(tmp_path / "d") as partial:
        (partial / "x").write_bytes(b"x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_directory_is_removed_with_the_parents_it_made(
    error: type[BaseException], tmp_path: Path
) -> None:

    def interrupted() -> None:
        with new_directory(tmp_path / "new" / "deeper" / "out") as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "file").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []


def test_errors_name_the_destination_not_the_temporary_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError) as caught, new_directory(out) as partial:
        write_atomic(partial / "model.safetensors", fills_the_disk)
    assert caught.value.file == str(out / "model.safetensors")
    with pytest.raises(CheckpointError, match="the disk is full") as caught, new_directory(out):
        disk_full()
    assert caught.value.file == str(out)


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "parent" / "out"
    with new_directory(out) as partial:
        (partial / "file").write_bytes(b"x")
        assert not out.exists()
    assert names(out) == ["file"]
    assert names(out.parent) == ["out"]


def test_an_empty_destination_is_taken_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty") as partial:
        (partial / "file").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not empty; give another path"), new_directory(tmp_path / "empty"):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file"), new_directory(tmp_path / "file"):
        pytest.fail("the block must not run")


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_atomic(tmp_path / "nowhere" / "a", b"x")
    with pytest.raises(CheckpointError, match="cannot be written"), new_directory(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_remove_stale_takes_only_temporary_names(tmp_path: Path) -> None:
    (tmp_path / ".step.1-ab.tmp").mkdir()
    (tmp_path / ".step.1-ab.tmp" / "x").write_bytes(b"x")
    for name in (".latest.json.1-ab.tmp", "step", ".hidden", "x.tmp"):
        (tmp_path / name).write_bytes(b"x")
    remove_stale(tmp_path)
    assert names(tmp_path) == [".hidden", "step", "x.tmp"]
