"""A run goes on from a whole checkpoint, whatever killed it and at whichever system call."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.run_dir import load_checkpoint, save_checkpoint, sha256_of
from smedjan.errors import CheckpointError


def save(run: Path, step: int, **options: object) -> Path:
    weights = {"w": RawTensor.of(np.full((4, 4), step, np.float32))}
    optimizer = {"w.m": RawTensor.of(np.full((4, 4), -step, np.float32))}
    return save_checkpoint(run, step, weights=weights, optimizer=optimizer, state={"seed": 7, "at": step}, **options)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.path, found.state) == (3, path, {"seed": 7, "at": 3})
    assert np.frombuffer(found.weights["w"].data, np.float32).tolist() == [3.0] * 16
    assert np.frombuffer(found.optimizer["w.m"].data, np.float32).tolist() == [-3.0] * 16
    assert path == tmp_path / "checkpoints" / "step-00000003"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]


def test_a_step_saved_twice_never_overwrites_the_one_pointed_to(tmp_path: Path) -> None:
    first, second = save(tmp_path, 4), save(tmp_path, 4)
    assert first != second
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.path == second


def test_going_on_from_an_older_step_drops_the_abandoned_future(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = save(tmp_path, 15, keep=1)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == [path.name]


def test_an_adapter_keeps_its_file_name(tmp_path: Path) -> None:
    path = save(tmp_path, 1, weights_name="adapter_model.safetensors")
    assert (path / "adapter_model.safetensors").is_file()
    assert load_checkpoint(tmp_path) is not None


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_damage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """A flipped bit, a truncated file, a missing file, a pointer to nothing: never a silent start from zero."""
    path = save(tmp_path, 2)
    optimizer, state, pointer = (
        path / "smedjan/optimizer.safetensors",
        path / "smedjan/state.json",
        tmp_path / "smedjan",
    )
    cases = {
        path / "model.safetensors": lambda file: flip_last_byte(file),
        optimizer: lambda file: file.write_bytes(file.read_bytes()[:-3]),
        state: lambda file: file.write_text("{"),
        pointer / "latest.json": lambda file: file.write_text('{"path": "../elsewhere"}'),
    }
    for file, damage in cases.items():
        before = file.read_bytes()
        damage(file)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path)
        assert caught.value.file == str(file)
        file.unlink()
        if file.parent != pointer:
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path)
        file.write_bytes(before)
    assert load_checkpoint(tmp_path) is not None
    path.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="is gone"):
        load_checkpoint(tmp_path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, 2) / "smedjan" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 99}))
    with pytest.raises(CheckpointError, match="schema"):
        load_checkpoint(tmp_path)


def test_sha256_sees_name_dtype_shape_and_bytes_but_not_order() -> None:
    a, b = RawTensor.of(np.zeros(4, np.float32)), RawTensor.of(np.ones(4, np.float32))
    same = {sha256_of({"a": a, "b": b}), sha256_of({"b": b, "a": a})}
    assert len(same) == 1
    others = [
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a},
        {"a": RawTensor(dtype="float32", shape=(2, 2), data=a.data), "b": b},
        {"a": RawTensor(dtype="int32", shape=(4,), data=a.data), "b": b},
    ]
    assert len({sha256_of(other) for other in others} | same) == len(others) + 1


CRASHES = """
import os, sys, shutil
from pathlib import Path
from smedjan.checkpoint import run_dir
from smedjan.checkpoint.raw import RawTensor

root = Path(sys.argv[1])
CALLS = ["fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open"]

def save(run, step):
    data = bytes([step]) * 64
    tensor = {"w": RawTensor(dtype="uint8", shape=(64,), data=memoryview(data))}
    run_dir.save_checkpoint(run, step, weights=tensor, optimizer=tensor, state={"at": step}, keep=1)

def crash_at(n):
    left = n
    def wrap(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return real(*args, **kwargs)
        return call
    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))

steps = set()
for n in range(1, 500):
    run = root / f"run{n}"
    save(run, 1)
    child = os.fork()
    if child == 0:
        crash_at(n)
        save(run, 2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = run_dir.load_checkpoint(run)
    assert found is not None and found.step in (1, 2), n
    assert found.state == {"at": found.step} and bytes(found.weights["w"].data) == bytes([found.step]) * 64, n
    steps.add(found.step)
    save(run, 2)
    assert run_dir.load_checkpoint(run).step == 2, n
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert len(left) == 1 and not left[0].startswith("."), left
    shutil.rmtree(run)
    if code == 0:
        break
assert code == 0 and steps == {1, 2}
print(n)
"""


def test_a_kill_before_any_system_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Dies before the 1st, 2nd, ... call that touches the disk in turn; every time the old or the new one loads."""
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
