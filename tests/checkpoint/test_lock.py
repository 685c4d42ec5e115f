"""One process writes a run; the lock goes with its process, and a checkpoint that is asked for is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from smedjan.checkpoint import lock
from smedjan.checkpoint.lock import RunLock, ask_checkpoint, holder, request_file
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.run_dir import save_checkpoint
from smedjan.errors import CheckpointError, ConfigError

HOLD = """
import sys, time
from pathlib import Path
from smedjan.checkpoint.lock import RunLock
with RunLock(Path(sys.argv[1])) as held:
    held.acquire()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path):
    """A process that holds the lock of tmp_path."""
    (tmp_path / "smedjan").mkdir()
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def test_a_second_process_is_refused_by_name(other: subprocess.Popen[str], tmp_path: Path) -> None:
    found = holder(tmp_path)
    assert found is not None
    assert found["pid"] == other.pid
    with pytest.raises(ConfigError, match=f"process {other.pid} on .* writes this run") as raised, RunLock(tmp_path):
        pass
    assert (raised.value.field, raised.value.file) == ("out", str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_killed_process_holds_nothing(other: subprocess.Popen[str], tmp_path: Path) -> None:
    """The file stays, and so does the number in it, which another process may have by now."""
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert json.loads((tmp_path / "smedjan" / lock.LOCK).read_text())["pid"] == other.pid
    assert holder(tmp_path) is None
    with RunLock(tmp_path):
        found = holder(tmp_path)
        assert found is not None
        assert found["pid"] == os.getpid()
    assert list((tmp_path / "smedjan").iterdir()) == []


def test_the_number_of_a_living_process_in_a_stale_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "smedjan").mkdir()
    (tmp_path / "smedjan" / lock.LOCK).write_text(json.dumps({"pid": os.getpid(), "host": "here", "since": "now"}))
    assert holder(tmp_path) is None
    with pytest.raises(CheckpointError, match="no process writes this run"):
        ask_checkpoint(tmp_path, timeout=5)


def test_a_file_that_was_unlinked_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends between a newcomer's open and its flock: what it locked is nobody's, and it tries again."""
    (tmp_path / "smedjan").mkdir()
    flock, path, ended = lock._flock, tmp_path / "smedjan" / lock.LOCK, []

    def late(file: int, how: int, where: Path) -> bool:
        if not ended:
            ended.append(os.fstat(file).st_ino)
            path.unlink()
        return flock(file, how, where)

    monkeypatch.setattr(lock, "_flock", late)
    with RunLock(tmp_path) as held:
        assert ended
        assert held._file is not None
        assert os.fstat(held._file).st_ino == path.stat().st_ino


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_two_that_start_the_same_run_at_once(tmp_path: Path) -> None:
    """Both found nothing there; the second gets the lock when the first has ended, and must not write over it."""
    with RunLock(tmp_path) as second:
        with RunLock(tmp_path) as first:
            first.acquire()
            (tmp_path / "smedjan" / "log.jsonl").write_text("{}\n")
        with pytest.raises(ConfigError, match="exists already"):
            second.acquire()


def saves(run: Path, step: int) -> None:
    tensors = {"w": RawTensor.of(np.zeros(4, np.float32))}
    save_checkpoint(run, step, weights=tensors, optimizer=tensors, state={})


@pytest.fixture
def running(tmp_path: Path):
    """This process as a run that takes steps, and answers at the end of each what was asked before it."""
    steps = threading.Event()
    done = threading.Event()

    def run() -> None:
        number = 0
        while not done.is_set():
            number += 1
            steps.wait(0.01)
            if request_file(tmp_path).exists():
                saves(tmp_path, number)
                request_file(tmp_path).unlink()

    with RunLock(tmp_path) as held:
        held.acquire()
        thread = threading.Thread(target=run)
        thread.start()
        yield thread
        done.set()
        thread.join()


def test_a_checkpoint_that_was_asked_for_is_there(running: threading.Thread, tmp_path: Path) -> None:
    made = ask_checkpoint(tmp_path, timeout=30)
    assert made.pid == os.getpid()
    assert (made.checkpoint / "smedjan" / "state.json").is_file()
    assert json.loads((made.checkpoint / "smedjan" / "state.json").read_text())["step"] == made.step
    assert ask_checkpoint(tmp_path, timeout=30).step > made.step


def test_a_run_that_does_not_answer(other: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint within 0\.1 s"):
        ask_checkpoint(tmp_path, timeout=0.1)
    assert not request_file(tmp_path).exists(), "nobody waits for it any more"


def test_a_run_that_dies_while_it_is_asked(other: subprocess.Popen[str], tmp_path: Path) -> None:
    threading.Timer(0.2, other.kill).start()
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="the run ended before"):
        ask_checkpoint(tmp_path, timeout=30)
    assert time.monotonic() - began < 20
    assert not request_file(tmp_path).exists()


def test_a_request_that_was_left_behind_asks_nothing_of_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "smedjan").mkdir()
    request_file(tmp_path).touch()
    with RunLock(tmp_path):
        assert not request_file(tmp_path).exists()
