"""A run among other processes, on a full disk, and on a machine without a network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import smedjan
from smedjan.checkpoint.lock import holder
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.cli import app
from smedjan.errors import ConfigError

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def running(configure):
    """A run of very many steps in a process of its own, which has taken its first."""
    config = configure("running", train__steps=100_000, train__save_every=0)
    words = ["finetune", "--quiet", "--model", config.model, "--data", config.data, "--out", config.out]
    words += ["--method", "full", "--backend", "torch_reference", "--train.batch-size", "4", "--optim.lr", "1e-2"]
    words += ["--train.steps", "100000", "--train.save-every", "0"]
    child = subprocess.Popen(
        [sys.executable, "-m", "smedjan", *map(str, words)],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, until = config.out / "smedjan" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < until, "no step in two minutes"
        time.sleep(0.01)
    yield config, child
    child.kill()
    child.communicate()


def test_a_run_is_asked_for_a_checkpoint_and_guarded_until_it_is_killed(running, capsys):
    config, child = running
    assert app.run(["run", "save", str(config.out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["command"], made["pid"]) == ("run save", child.pid)
    found = load_checkpoint(config.out)
    assert (str(found.path), found.step) == (made["checkpoint"], made["step"])
    assert child.poll() is None, "the run goes on"

    with pytest.raises(ConfigError, match=f"process {child.pid} on .* writes this run"):
        smedjan.finetune(replace(config, resume=True))
    assert holder(config.out)["pid"] == child.pid, "the refused one let go of nothing"

    child.send_signal(signal.SIGKILL)
    child.wait()
    assert app.run(["run", "save", str(config.out)]) == 2
    assert "no process writes this run" in capsys.readouterr().err

    class Stop(Exception):
        pass

    seen = []

    def on_step(event):
        seen.append(event)
        if "loss" in event:
            raise Stop

    with pytest.raises(Stop):
        smedjan.finetune(replace(config, resume=True), on_step=on_step)
    assert seen[0]["header"]["steps"]["done"] == made["step"], "it goes on from the checkpoint that was asked for"
    assert holder(config.out) is None


FULL = """
import json, subprocess, sys
from pathlib import Path
import smedjan
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.errors import CheckpointError
from smedjan.train.config import FinetuneConfig

flags = json.load(sys.stdin)
disk = Path(flags["out"]).parent
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "smedjan", disk], check=True)
try:
    smedjan.finetune(FinetuneConfig.from_toml(None, flags))
    said = None
except CheckpointError as error:
    said = {"error": str(error), "errno": error.__cause__.errno}
found = load_checkpoint(Path(flags["out"]))
left = [str(path) for path in Path(flags["out"]).rglob("*.tmp")]
subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
resumed = smedjan.finetune(FinetuneConfig.from_toml(None, {**flags, "resume": True}))
print(json.dumps({"said": said, "step": found.step, "left": left, "weights": resumed.weights_sha256}))
"""
"""Mounts a disk of one megabyte in a namespace of its own, trains on it until it is full, then gives it more."""


def own_mounts() -> list[str]:
    """The command that may mount, in a namespace that goes with it."""
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        tried = subprocess.run(
            [*words, "sh", "-c", "mount -t tmpfs -o size=1m smedjan /mnt"], capture_output=True, check=False
        )
        if tried.returncode == 0:
            return words
    return []


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_during_a_save(configure, tmp_path):
    """The checkpoint before is whole, nothing half-written is left, and the run goes on to the weights of one that
    always had room."""
    words = own_mounts()
    if not words:
        pytest.skip("this machine lets nobody mount a tmpfs, in a user namespace neither")
    (tmp_path / "disk").mkdir()
    flags = {"train__steps": 4, "train__save_every": 1}
    config = configure("disk/run", **flags)
    child = subprocess.run(
        [*words, sys.executable, "-c", FULL],
        input=json.dumps(config.to_dict()),
        env=ENV,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["said"] is not None, "a megabyte was enough: the disk is too large for this test"
    assert "the disk is full" in found["said"]["error"]
    assert "\n" not in found["said"]["error"]
    assert os.strerror(found["said"]["errno"]) == "No space left on device"
    assert found["step"] == 1
    assert found["left"] == []
    assert found["weights"] == smedjan.finetune(configure("whole", **flags)).weights_sha256


_opened: list[str] = []
_listening = [False]


def _hook(name, given):
    if _listening[0] and name.startswith("socket.") and name != "socket.gethostname":
        _opened.append(name)


def test_a_run_opens_no_socket(configure, write_rows, tmp_path):
    """No telemetry: none is made in Python, and none is open in the process at any event. With all that a run can do
    on its own: evaluation, samples, checkpoints, TensorBoard's files."""
    import socket

    sys.addaudithook(_hook)  # stays for good, silent after this test

    def sockets():
        if not os.path.isdir("/proc/self/fd"):
            return set()
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:  # the listing's own
                continue
            if target.startswith("socket:"):
                found.add(target)
        return found

    valid = write_rows([{"prompt": "hello 3 ", "completion": "world 0"}], "valid.jsonl")
    config = configure(
        eval_data=str(valid),
        method="lora",
        train__steps=3,
        train__save_every=1,
        train__sample_every=1,
        train__track="tensorboard",
    )
    before, during = sockets(), []
    _opened.clear()
    _listening[0] = True
    try:
        smedjan.finetune(config, on_step=lambda event: during.append(sockets() - before))
        assert _opened == []
        socket.socket().close()
        assert _opened, "the hook hears a socket that is made"
    finally:
        _listening[0] = False
    assert len(during) > 6
    assert not any(during)
