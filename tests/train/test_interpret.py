"""Issue 5, Shows: "`finetune --backend cuda_triton --interpret` runs the very launches a GPU would run."

That the launches are those is held by tests/backends/cuda_triton/test_program.py: what is planned without memory is
what runs. Here: the command is that run, and without the flag or a GPU it is one clear error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import smedjan
from smedjan.train.config import FinetuneConfig

FLAGS = {"method": "lora", "train.steps": 2, "train.batch_size": 2, "train.packing": True, "optim.lr": 1e-2}


@pytest.fixture
def command(tiny, write_rows, tmp_path):
    """Runs `smedjan finetune` with more words, in a process that was told nothing of interpreting and sees no GPU."""
    rows = write_rows([{"prompt": f"hello {i} ", "completion": f"w {i % 3}"} for i in range(8)])
    given = {"model": str(tiny), "data": str(rows), "backend": "cuda_triton", **FLAGS}

    def run(*more):
        words = [sys.executable, "-m", "smedjan", "finetune", "--json", *more]
        for name, value in given.items():
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    return given, run


def test_the_command_is_the_run(command, tmp_path):
    given, run = command
    done = run("--interpret", "--out", str(tmp_path / "command"))
    assert done.returncode == 0, done.stderr
    header, *steps, last = (json.loads(line) for line in done.stdout.splitlines())
    seen = []
    made = smedjan.finetune(
        FinetuneConfig.from_toml(None, {**given, "out": str(tmp_path / "here")}), on_step=seen.append
    )
    assert [step["loss"] for step in steps] == [event["loss"] for event in seen[1:]]
    assert header["header"]["plan_hash"] == seen[0]["header"]["plan_hash"] == made.plan_hash
    assert last["weights_sha256"] == made.weights_sha256
    assert last["plan_hash"] == made.plan_hash


def test_without_the_flag_or_a_gpu_it_says_so(command, tmp_path):
    _, run = command
    done = run("--out", str(tmp_path / "none"))
    assert done.returncode == 2
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["field"] == "backend"
    assert "--interpret" in error["remedy"]
    assert not (tmp_path / "none").exists()
