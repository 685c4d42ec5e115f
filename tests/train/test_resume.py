"""Issue 3, Shows: "`kill -9` at a random step, then `--resume`: the same `weights_sha256` as the run never stopped, ten
seeds." And Ctrl-C: exit code 130 after a checkpoint."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

import smedjan
from smedjan.errors import ConfigError, SmedjanError

STEPS = 14
TYPED = {"model", "data", "out", "method", "backend", "train.steps", "train.batch_size", "train.save_every", "optim.lr"}

KILLED = """
import json, os, random, signal, sys, threading, time
import torch
import smedjan.api
from smedjan.backends import cpu_native, torch_reference
from smedjan.train.config import FinetuneConfig

def run(flags, at, delay):
    def kill():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)
    def on_step(event):
        if event["step"] == at:
            threading.Thread(target=kill).start()
    smedjan.api.finetune(FinetuneConfig.from_toml(None, flags), on_step=on_step)

ends = []
for flags, at, delay in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        run(flags, at, delay)
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""
"""Torch is imported once, and no operation run, before each run gets a process of its own, which a SIGKILL ends a
random time after a random step: while the next one computes, or a checkpoint is written."""


def flags_of(config):
    return {
        f"{section}.{key}" if isinstance(value, dict) else section: inner
        for section, value in config.to_dict().items()
        for key, inner in (value.items() if isinstance(value, dict) else [(section, value)])
        if inner is not None
    }


@pytest.fixture
def seeded(configure):
    """Of one seed: full and LoRA, both backends of the CPU, dropout, accumulation, packing and save_every vary."""

    def make(seed, out):
        flags = {
            "seed": seed,
            "method": "lora" if seed % 2 else "full",
            "backend": "cpu_native" if seed % 3 == 2 else "torch_reference",
            "train__steps": STEPS,
            "train__save_every": 1 + seed // 2 % 2,
            "train__grad_accum": 2 if seed % 5 == 0 else 1,
            "train__packing": seed % 4 == 1,
            "lora__dropout": 0.1 if seed % 4 == 3 else 0.0,
            "lora__rank": 4,
        }
        return configure(f"{out}{seed}", **flags)

    return make


def run_killed(jobs):
    """Exit codes of [(config, step, delay)], each killed that many seconds after that step was logged."""
    child = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=json.dumps([(flags_of(config), at, delay) for config, at, delay in jobs]),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_kill_9_then_resume(seeded, read_log):
    """Ten seeds. Each whole run is in a process that was never killed, the resumed ones in it too."""
    seeds = range(10)
    jobs = []
    for seed in seeds:
        chance = random.Random(seed)
        jobs.append((seeded(seed, "killed"), chance.randint(1, STEPS - 6), chance.uniform(0, 0.015)))
    assert run_killed(jobs) == [-signal.SIGKILL] * len(jobs)
    began = []
    for seed, (config, at, _) in zip(seeds, jobs, strict=True):
        whole = smedjan.finetune(seeded(seed, "whole"))
        assert not (config.out / "model.safetensors").exists(), "the run had ended"
        seen = []
        resumed = smedjan.finetune(replace(config, resume=True), on_step=seen.append)
        assert resumed.weights_sha256 == whole.weights_sha256, f"seed {seed}, killed after step {at}"
        assert [event["step"] for event in read_log(config.out).steps] == list(range(1, STEPS + 1))
        losses = [[event["loss"] for event in read_log(run.run_dir).steps] for run in (whole, resumed)]
        assert losses[0] == losses[1]
        began.append(seen[0]["step"] + 1)
        assert at - config.train.save_every < began[-1], "no more than save_every steps are lost"
    assert max(began) > 2, "the runs went on from a checkpoint, and did not begin anew"


def test_another_seed_is_another_hash(seeded):
    """Equal hashes above mean something: dropout, order and adapters all come from the seed."""
    hashes = {smedjan.finetune(replace(seeded(3, f"s{seed}-"), seed=seed)).weights_sha256 for seed in (3, 4)}
    assert len(hashes) == 2


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ctrl_c(configure, read_log, method):
    """The step is finished, a checkpoint written, the exit code is 130, and the run goes on to the same weights."""
    flags = {"method": method, "train__steps": 100, "train__save_every": 0}
    config = configure("stopped", **flags)
    command = "from smedjan.cli import main; main()"
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags_of(config).items() if name in TYPED]
    child = subprocess.Popen(
        [sys.executable, "-c", command, "finetune", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = config.out / "smedjan" / "log.jsonl"
    until = time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") >= 4):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < until, "no step in a minute"
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert said.splitlines()[-1].startswith("smedjan: stopped after step "), said
    stopped = int(said.rpartition("after step ")[2].split(";")[0])
    assert 3 <= stopped < 100
    assert len(read_log(config.out).steps) == stopped, "the step was finished"
    seen = []
    resumed = smedjan.finetune(replace(config, resume=True), on_step=seen.append)
    assert seen[1]["step"] == stopped + 1, "no step is lost"
    assert resumed.weights_sha256 == smedjan.finetune(configure("whole", **flags)).weights_sha256


def checkpoints(config) -> list[str]:
    return sorted(path.name for path in (config.out / "checkpoints").iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="not on Windows")
def test_sigusr1_saves_a_checkpoint_and_changes_nothing_else(configure):
    flags = {"train__steps": 4, "train__save_every": 0, "train__keep": 9}
    config, whole = configure("asked", **flags), configure("whole", **flags)

    def on_step(event):
        if event["step"] == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    assert smedjan.finetune(config, on_step=on_step).weights_sha256 == smedjan.finetune(whole).weights_sha256
    assert checkpoints(config) == ["step-00000002", "step-00000004"]
    assert checkpoints(whole) == ["step-00000004"]
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_stay(configure, keep):
    config = configure(train__steps=4, train__save_every=1, train__keep=keep)
    smedjan.finetune(config)
    assert checkpoints(config) == [f"step-{step:08}" for step in range(5 - keep, 5)]


class Stop(Exception):
    """Raised by a test's `on_step`."""


def stop_after(config, step):
    """The run as a crash right after `step` was logged leaves it."""

    def on_step(event):
        if event["step"] == step:
            raise Stop

    with pytest.raises(Stop):
        smedjan.finetune(config, on_step=on_step)


CHANGES = {
    "seed": {"seed": 1},
    "rate": {"optim__lr": 2e-2},
    "steps": {"train__steps": 9},
    "batch size": {"train__batch_size": 2},
    "packing": {"train__packing": True},
    "method": {"method": "lora"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_with_another_flag(configure, change):
    stop_after(configure(train__steps=6, train__save_every=1), 3)
    changed = configure(**{"train__steps": 6, "train__save_every": 1, **CHANGES[change]}, resume=True)
    with pytest.raises(SmedjanError, match="another") as raised:
        smedjan.finetune(changed)
    assert "\n" not in str(raised.value)


def test_resume_with_other_rows(configure, pairs, write_rows):
    stop_after(configure(train__steps=6, train__save_every=1), 3)
    lines = pairs.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[7]["completion"] = "world 9"
    other = write_rows(rows, "other.jsonl")
    with pytest.raises(SmedjanError, match="the rows are not those"):
        smedjan.finetune(configure(data=str(other), train__steps=6, train__save_every=1, resume=True))


def test_resume_over_another_base(configure, tiny, tmp_path):
    """Adapters of one base mean nothing over another of the same shapes."""
    stop_after(configure(method="lora", train__steps=6, train__save_every=1), 3)
    other = shutil.copytree(tiny, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SmedjanError, match="base_sha256"):
        smedjan.finetune(configure(model=str(other), method="lora", train__steps=6, train__save_every=1, resume=True))


def test_what_decides_no_number_may_change(configure):
    """When to save is no part of the run: it may differ on resume, and so may the path of the same rows."""
    stop_after(configure(train__steps=6, train__save_every=1), 3)
    resumed = smedjan.finetune(configure(train__steps=6, train__save_every=2, resume=True))
    assert resumed.weights_sha256 == smedjan.finetune(configure("whole", train__steps=6)).weights_sha256


def test_an_existing_out_without_resume(configure):
    config = configure(train__steps=3, train__save_every=1)
    run = smedjan.finetune(config)
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="exists already") as raised:
        smedjan.finetune(config)
    assert raised.value.field == "out"
    assert before == {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    again = smedjan.finetune(replace(config, resume=True))
    assert again.weights_sha256 == run.weights_sha256, "resuming a run that ended changes nothing"


def test_a_directory_of_something_else(configure, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="exists already"):
        smedjan.finetune(configure(train__steps=3))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["letter.txt"]
