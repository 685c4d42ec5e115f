"""Issue 6 item 9: "data-parallel over torch.distributed between micro and update, started by torchrun or accelerate
launch, same losses as one process with the whole batch (gloo on CPU, two processes in the tests), state sharded on save
through safetensors shards, resume with another number of processes." """

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import smedjan
from smedjan.backends.collective import Alone
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.errors import CheckpointError, ConfigError, Elsewhere
from smedjan.train import finetune as train_finetune
from smedjan.train.parts import Finetune
from smedjan.train.processes import first, rank_and_world
from tests.tolerances import UNIT_ROUNDOFF
from tests.train.conftest import write_uneven_rows
from tests.train.test_resume import checkpoints, flags_of, stop_after

STEPS, STOP = 6, 3
U = UNIT_ROUNDOFF[torch.float32]
SCRIPTS = Path(sys.executable).parent
LAUNCHED = {**os.environ, "OMP_NUM_THREADS": "1"}

TOGETHER = """
import errno, json, os, pathlib, signal, sys
import torch.distributed as dist
import smedjan
from smedjan.checkpoint import atomic, shared
from smedjan.errors import SmedjanError
from smedjan.train import step
from smedjan.train.config import FinetuneConfig

rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
whole_step, whole_save = step.Trainer.step, shared.save_file

def signalled(self, batches, *, number, lr, taken=None):
    made = whole_step(self, batches, number=number, lr=lr, taken=taken)
    if rank == 1 and number == at:
        os.kill(os.getpid(), getattr(signal, trouble))
    return made

def full_disk(path, tensors):
    with atomic.write_errors(path):
        raise OSError(errno.ENOSPC, "no space")

dist.init_process_group("gloo")
ends = {}
for name, (flags, trouble, at) in json.loads((folder / "jobs.json").read_text()).items():
    step.Trainer.step = signalled if trouble.startswith("SIG") else whole_step
    shared.save_file = full_disk if trouble == "full disk" and rank == 1 else whole_save
    try:
        run = smedjan.finetune(FinetuneConfig.from_toml(None, flags))
        ends[name] = run.weights_sha256
    except (SmedjanError, KeyboardInterrupt) as error:
        ends[name] = [type(error).__name__, str(error)]
(folder / f"ends-{rank}.json").write_text(json.dumps(ends))
"""
"""The runs of jobs.json in one pair of processes. In process 1 something happens: a signal after step `at`, or its disk
is full. What each run came to is in ends-RANK.json."""

JOBS = {
    # 3 micro-batches for 2 processes: process 0 has two, process 1 one
    "uneven": {"method": "full", "train__grad_accum": 3, "train__eval_every": 2},
    "dropout": {
        "method": "lora",
        "lora__rank": 4,
        "lora__dropout": 0.1,
        "train__grad_accum": 4,
        "train__packing": True,
    },
    # The first process's singular vectors and norms are all processes'
    "adapters": {
        **{"method": "qlora", "lora__rank": 4, "lora__init": "pissa", "lora__dora": True},
        **{"lora__bits": 8, "train__grad_accum": 2},
    },
    "idle": {"method": "full", "backend": "cpu_native", "train__batch_size": 1},
    "resumed by two": {"method": "full", "train__grad_accum": 2},
    "stopped": {"method": "lora", "lora__rank": 4, "train__grad_accum": 2, "train__save_every": 0},
    "asked": {"method": "lora", "lora__rank": 4, "train__save_every": 0},
    "full disk": {"method": "full", "train__grad_accum": 2},
    "split": {"method": "full", "train__batch_size": 8, "optim__lr": 1e-3},
    "summed": {"method": "full", "backend": "cpu_native", "train__grad_accum": 4},
}
TROUBLE = {"stopped": ("SIGINT", STOP), "asked": ("SIGUSR1", STOP), "full disk": ("full disk", 0)}


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """All runs of JOBS in two processes under torchrun: `config(name, out)`, and the `ends` of each process."""
    from smedjan.train.config import FinetuneConfig

    folder = tmp_path_factory.mktemp("two")
    write_uneven_rows(folder)

    def config(name, out):
        flags = {
            "model": str(tiny),
            "data": str(folder / "rows.jsonl"),
            "eval_data": str(folder / "valid.jsonl") if name == "uneven" else None,
            "out": str(folder / out / name),
            "backend": "torch_reference",
            "train__batch_size": 3,
            "train__steps": STEPS,
            "train__save_every": STOP,
            "optim__lr": 1e-2,
            **JOBS[name],
        }
        return FinetuneConfig.from_toml(None, {key.replace("__", "."): value for key, value in flags.items()})

    stop_after(config("resumed by two", "two"), STOP + 1)
    jobs = {}
    for name in JOBS:
        flags = flags_of(replace(config(name, "two"), resume=name == "resumed by two"))
        jobs[name] = (flags, *TROUBLE.get(name, ("", 0)))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "together.py").write_text(TOGETHER)
    child = subprocess.run(
        [SCRIPTS / "torchrun", "--nproc-per-node", "2", folder / "together.py", folder],
        env=LAUNCHED,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    ends = [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in range(2)]
    return config, ends


def logged(run_dir):
    """Events of log.jsonl behind the header, without what the clock and the memory say."""
    events = [json.loads(line) for line in (run_dir / "smedjan" / "log.jsonl").read_text().splitlines()]
    measured = ("tokens_per_s", "peak_bytes", "mfu", "eta_s", "at")
    return [{key: event[key] for key in event if key not in measured} for event in events if "header" not in event]


@pytest.mark.parametrize("name", ["uneven", "dropout", "adapters", "resumed by two", "idle"])
def test_two_processes_are_one_to_the_bit(two, name):
    """Losses, gradient norms, evaluation losses and weights. On the exact backend gradients are added in the order of
    the micro-batches; a process that has none changes nothing on any."""
    config, ends = two
    one = smedjan.finetune(config(name, "one"))
    assert ends[0][name] == ends[1][name] == one.weights_sha256
    assert logged(config(name, "two").out) == logged(one.run_dir)
    assert len([event for event in logged(one.run_dir) if "loss" in event]) == STEPS


def test_each_process_writes_its_share_of_the_state(two):
    config, _ = two
    [one, *many] = sorted((config("uneven", "two").out / "checkpoints").iterdir())[-1].joinpath("smedjan").iterdir()
    names = sorted(path.name for path in (one, *many))
    shards = [f"optimizer-{k:05}-of-00002.safetensors" for k in (1, 2)]
    assert names == [*shards, "optimizer.safetensors.index.json", "state.json"]
    first, second = ((one.parent / shard).stat().st_size for shard in shards)
    assert 0.4 < first / second < 2.5
    found = load_checkpoint(config("uneven", "two").out)
    assert len(found.optimizer) == 2 * len(found.weights)
    assert [leg["processes"] for leg in load_checkpoint(config("resumed by two", "two").out).state["history"]] == [1, 2]


def test_a_damaged_shard_is_named(two, tmp_path):
    config, _ = two
    run = shutil.copytree(config("uneven", "two").out, tmp_path / "run")
    shard = max(run.glob("checkpoints/*/smedjan/optimizer-00002-of-00002.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="do not match") as raised:
        load_checkpoint(run)
    assert raised.value.file == str(shard)
    shard.unlink()
    with pytest.raises(CheckpointError):
        load_checkpoint(run)


def test_ctrl_c_in_one_stops_both_and_one_goes_on(two):
    """After the same step, with a checkpoint; one process then comes to the weights of a run that never stopped."""
    config, ends = two
    assert (
        ends[0]["stopped"] == ends[1]["stopped"] == ["Interrupted", f"stopped after step {STOP}; go on with --resume"]
    )
    assert checkpoints(config("stopped", "two")) == [f"step-{STOP:08}"]
    resumed = smedjan.finetune(replace(config("stopped", "two"), resume=True))
    assert resumed.weights_sha256 == smedjan.finetune(config("stopped", "one")).weights_sha256


def test_sigusr1_in_one_saves_once(two):
    config, ends = two
    assert ends[0]["asked"] == ends[1]["asked"]
    assert checkpoints(config("asked", "two")) == [f"step-{STOP:08}", f"step-{STEPS:08}"]


def test_a_full_disk_of_one_is_said_once_and_leaves_nothing(two):
    config, ends = two
    assert ends[1]["full disk"][0] == "CheckpointError"
    assert "the disk is full" in ends[1]["full disk"][1]
    assert ".tmp" not in ends[1]["full disk"][1]
    assert ends[0]["full disk"][0] == "Elsewhere"
    assert "process 1: " in ends[0]["full disk"][1]
    assert list((config("full disk", "two").out / "checkpoints").iterdir()) == []


def test_rows_shared_out_where_there_are_fewer_micro_batches(two, tiny, peer_trainer):
    """Eight rows of one micro-batch as four and four: other sums, no further from float64 than twice float32 is."""
    config, ends = two
    assert ends[0]["split"] == ends[1]["split"]
    parts = Finetune(config("split", "one"))
    curves = []
    for dtype in (torch.float64, torch.float32):
        peer = peer_trainer(tiny, dtype, lr=1.0, clip=1.0)
        losses = []
        for step in range(STEPS):
            peer.optimizer.param_groups[0]["lr"] = parts.learning_rate(step)
            losses.append(peer.step(parts.steps.batches_for_step(step)))
        curves.append(np.array(losses))
    truth, plain = curves
    ours = np.array([event["loss"] for event in logged(config("split", "two").out)])
    assert len(ours) == STEPS
    off, spread = np.abs(ours - truth).max(), np.abs(plain - truth).max()
    assert off <= 2 * spread + 2 * U * truth.max(), f"{off:.3e} away, float32 is {spread:.3e}"


def test_a_fast_backend_sums_in_another_order(two):
    """(g0 + g2) + (g1 + g3) for ((g0 + g1) + g2) + g3. The loss before the first update is the same to the bit. The
    gradient is within 2 (M - 1) u sum |g_m|, and so its norm is, but for the norm's own rounding: n + 1 roundings of a
    sum of n squares halved by the root, of each of the two."""
    config, ends = two
    assert ends[0]["summed"] == ends[1]["summed"]
    parts = Finetune(config("summed", "one"))
    trainer, batches = parts.trainer(), parts.steps.batches_for_step(0)
    items, parts_norms, values = sum(batch.trained_tokens for batch in batches), [], 0
    for batch in batches:
        _, grads = trainer.session.micro(batch, trainer.names, num_items=items)
        parts_norms.append(float(torch.cat([grad.flatten().double() for grad in grads.values()]).norm()))
        values = sum(grad.numel() for grad in grads.values())
    loss, norm = trainer.step(batches, number=1, lr=parts.learning_rate(0))
    first = logged(config("summed", "two").out)[0]
    assert first["loss"] == loss
    bound = 2 * (len(batches) - 1) * U * sum(parts_norms) + (values + 1) * U * norm
    assert abs(first["grad_norm"] - norm) <= bound


def test_accelerate_launch(configure, read_log):
    """The command line: each step's line and the result once, from process 0 alone."""
    config = configure("two", method="lora", train__steps=3, train__grad_accum=2)
    typed = {
        "model",
        "data",
        "out",
        "method",
        "backend",
        "train.steps",
        "train.batch_size",
        "train.grad_accum",
        "optim.lr",
    }
    child = subprocess.run(
        [SCRIPTS / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        + ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "smedjan"]
        + ["finetune", "--json"]
        + [f"--{name.replace('_', '-')}={value}" for name, value in flags_of(config).items() if name in typed],
        env=LAUNCHED,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    _header, *steps, end = map(json.loads, child.stdout.splitlines())
    one = smedjan.finetune(replace(config, out=config.out.with_name("one")))
    assert end["weights_sha256"] == one.weights_sha256
    assert [step["loss"] for step in steps] == [event["loss"] for event in read_log(one.run_dir).steps]


LOST = """
import json, os, signal, sys, time
import torch
from datetime import timedelta
from smedjan.backends.torch_reference import collective
from smedjan.runtime.select import backend
from smedjan.train.processes import together

collective.TIMEOUT = timedelta(seconds=2)
torch_reference = backend("torch_reference")
for port, trouble in zip(sys.argv[1:], (signal.SIGKILL, signal.SIGSTOP)):
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ["RANK"] = str(rank)
            began = time.monotonic()
            try:
                with together(torch_reference) as group:
                    group.exchange()
                    if rank == 1:
                        os.kill(os.getpid(), trouble)
                    group.exchange()
            except collective.Lost as error:
                print(json.dumps([str(error), time.monotonic() - began]), flush=True)
            os._exit(0)
        children.append(child)
    os.waitpid(children[0], 0)
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)
"""


def test_a_process_that_dies_or_hangs(free_ports):
    """One line, at once or after the timeout (2 s here)."""
    child = subprocess.run(
        [sys.executable, "-c", LOST, *map(str, free_ports)], env=LAUNCHED, capture_output=True, text=True, timeout=60
    )
    assert child.returncode == 0, child.stderr
    said = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(said) == 2, child.stderr
    for text, seconds in said:
        assert text.startswith("another process of the run ended, or did not answer for 2 s; see what it said")
        assert seconds < 20


@pytest.fixture
def free_ports():
    import socket

    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def test_mlx_is_not_started_by_torchrun(configure, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, error in (("0", ConfigError), ("1", Elsewhere)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(error, match=r"mlx\.launch"):
            smedjan.finetune(configure(backend="mlx_metal"))


@pytest.mark.parametrize(
    ("environment", "field"),
    [({"WORLD_SIZE": "two"}, "WORLD_SIZE"), ({"WORLD_SIZE": "2"}, "RANK"), ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK")],
)
def test_an_environment_that_no_launcher_makes(monkeypatch, environment, field):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_world() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    assert rank_and_world() == (0, 1), "a number of another world"
    assert first()
    monkeypatch.delenv("RANK")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        rank_and_world()
    assert raised.value.field == field


def test_nothing_is_written_before_all_have_looked(configure, monkeypatch):
    """A process that looks late would find the directory of its own run in use."""
    config, seen = configure(train__steps=1), []

    class Watching(Alone):
        def gather(self, message):
            seen.append(sorted(path.name for path in config.out.rglob("*")))
            return super().gather(message)

    monkeypatch.setattr(train_finetune, "together", lambda backend: nullcontext(Watching()))
    smedjan.finetune(config)
    assert seen[0] == []
    assert seen[1] == ["run.lock", "smedjan"], "and a second run would be refused before any goes on"


def test_ctrl_c_that_a_launcher_passes_on_is_one(monkeypatch, tmp_path):
    from smedjan.train import asked

    with asked.asked(tmp_path / "save.request", several=True) as wanted:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert wanted.stop
        monkeypatch.setattr(asked, "ECHO", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
