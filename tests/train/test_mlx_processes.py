"""Data-parallel runs of mlx_metal over mx.distributed's ring: two processes of this machine, against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

import smedjan
from smedjan.backends.mlx_metal.collective import buckets
from smedjan.errors import ConfigError
from smedjan.train.config import FinetuneConfig
from smedjan.train.parts import Finetune
from smedjan.train.processes import first, rank_and_world
from tests.tolerances import UNIT_ROUNDOFF
from tests.train.conftest import write_uneven_rows
from tests.train.test_processes import logged
from tests.train.test_resume import checkpoints, flags_of

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring")

STEPS, STOP = 4, 2
U = UNIT_ROUNDOFF[torch.float32]
LAUNCHED = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}

TOGETHER = """
import json, os, pathlib, signal, sys
import smedjan
from smedjan.errors import ConfigError, SmedjanError
from smedjan.train import step
from smedjan.train.config import FinetuneConfig

rank, folder = int(os.environ["MLX_RANK"]), pathlib.Path(sys.argv[1])
whole_step = step.Trainer.step

def troubled(self, batches, *, number, lr, taken=None):
    made = whole_step(self, batches, number=number, lr=lr, taken=taken)
    if rank == 1 and number == at:
        if trouble == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        elif trouble == "error":
            raise ConfigError("no more", field="x", remedy="stop")
        elif trouble == "death":
            os._exit(0)
    return made

step.Trainer.step = troubled
ends = {}
for name, (flags, trouble, at) in json.loads((folder / "jobs.json").read_text()).items():
    try:
        ends[name] = smedjan.finetune(FinetuneConfig.from_toml(None, flags)).weights_sha256
    except (SmedjanError, KeyboardInterrupt) as error:
        ends[name] = [type(error).__name__, str(error)]
    (folder / f"ends-{rank}.json").write_text(json.dumps(ends))
"""

JOBS = {
    "two": {"method": "full", "train__grad_accum": 2, "train__eval_every": 2},
    "dropout": {"method": "lora", "lora__dropout": 0.1, "train__grad_accum": 2, "train__packing": True},
    # The first process's norms are all processes'
    "dora": {"method": "qlora", "lora__dora": True, "lora__bits": 8, "train__grad_accum": 2},
    # Process 1 has no rows
    "idle": {"method": "full", "train__batch_size": 1},
    "summed": {"method": "full", "train__grad_accum": 3},
    "stopped": {"method": "lora", "train__grad_accum": 2, "train__save_every": 0},
    "error": {"method": "lora", "train__grad_accum": 2},
    "death": {"method": "lora", "train__grad_accum": 2},
}
TROUBLE = {"stopped": ("SIGINT", STOP), "error": ("error", STOP), "death": ("death", STOP)}


def free_port():
    """One that is free, and so is the next: mlx.launch counts up."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """All runs of JOBS in two processes: `config(name, out)`, and the `ends` of each process."""
    folder = tmp_path_factory.mktemp("pair")
    write_uneven_rows(folder)

    def config(name, out):
        flags = {
            "model": str(tiny),
            "data": str(folder / "rows.jsonl"),
            "eval_data": str(folder / "valid.jsonl") if name == "two" else None,
            "out": str(folder / out / name),
            "backend": "mlx_metal",
            "lora__rank": 4,
            "train__batch_size": 3,
            "train__steps": STEPS,
            "optim__lr": 1e-2,
            **JOBS[name],
        }
        return FinetuneConfig.from_toml(None, {key.replace("__", "."): value for key, value in flags.items()})

    jobs = {name: (flags_of(config(name, "pair")), *TROUBLE.get(name, ("", 0))) for name in JOBS}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    port = free_port()
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(2)]))
    environment = {**LAUNCHED, "MLX_HOSTFILE": str(folder / "hosts.json")}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, folder], env={**environment, "MLX_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for child in children:
        said = child.communicate(timeout=100)[1]
        assert child.returncode == 0, said.decode()
    ends = [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in range(2)]
    return config, ends


@pytest.mark.parametrize("name", ["two", "dropout", "dora", "idle"])
def test_two_processes_are_one_to_the_bit(pair, name):
    """Losses, norms, evaluation losses and weights: a sum of two has one order, dropout's masks are of the micro-batch
    and not of the process, and a process that has none changes nothing."""
    config, ends = pair
    one = smedjan.finetune(config(name, "one"))
    assert ends[0][name] == ends[1][name] == one.weights_sha256
    assert logged(config(name, "pair").out) == logged(one.run_dir)
    assert len([event for event in logged(one.run_dir) if "loss" in event]) == STEPS


def test_three_micro_batches_are_summed_in_another_order(pair):
    """(g0 + g2) + g1 for (g0 + g1) + g2: the first loss is the same to the bit, and so the gradient is within
    2 (M - 1) u sum |g_m|, its norm within that and the norm's own rounding, n + 1 roundings halved by the root."""
    config, ends = pair
    assert ends[0]["summed"] == ends[1]["summed"]
    parts = Finetune(config("summed", "one"))
    trainer, batches = parts.trainer(), parts.steps.batches_for_step(0)
    items, norms, values = sum(batch.trained_tokens for batch in batches), [], 0
    for batch in batches:
        _, grads = trainer.session.micro(batch, trainer.names, num_items=items)
        norms.append(float(np.sqrt(sum(np.square(np.array(grad, dtype=np.float64)).sum() for grad in grads.values()))))
        values = sum(grad.size for grad in grads.values())
    loss, norm = trainer.step(batches, number=1, lr=parts.learning_rate(0))
    found = logged(config("summed", "pair").out)[0]
    assert found["loss"] == loss
    assert abs(found["grad_norm"] - norm) <= 2 * (len(batches) - 1) * U * sum(norms) + (values + 1) * U * norm


def test_ctrl_c_in_one_stops_both_and_one_goes_on(pair):
    config, ends = pair
    said = ["Interrupted", f"stopped after step {STOP}; go on with --resume"]
    assert ends[0]["stopped"] == ends[1]["stopped"] == said
    assert checkpoints(config("stopped", "pair")) == [f"step-{STOP:08}"]
    resumed = smedjan.finetune(replace(config("stopped", "pair"), resume=True))
    assert resumed.weights_sha256 == smedjan.finetune(config("stopped", "one")).weights_sha256


def test_an_error_of_one_is_said_once(pair):
    _, ends = pair
    assert ends[1]["error"] == ["ConfigError", "x: no more; stop"]
    assert ends[0]["error"][0] == "Elsewhere"


def test_one_that_dies_ends_the_other(pair):
    _, ends = pair
    assert "death" not in ends[1]
    kind, said = ends[0]["death"]
    assert kind == "Lost"
    assert said.startswith("another process of the run ended; see what it said")


def test_mlx_launch(pair, configure, read_log):
    """The command line: each step's line and the result once, from process 0 alone."""
    config = configure("launched", backend="mlx_metal", train__steps=2, train__grad_accum=2)
    words = ["--model", config.model, "--data", str(config.data), "--out", str(config.out), "--method", "full"]
    words += ["--backend", "mlx_metal", "--train.steps", "2", "--train.grad-accum", "2", "--train.batch-size", "4"]
    words += ["--optim.lr", "1e-2"]
    launch = ["--backend", "ring", "-n", "2", "-p", str(free_port()), "--"]
    launcher = Path(sys.executable).parent / "mlx.launch"
    child = subprocess.run(
        [launcher, *launch, sys.executable, "-m", "smedjan", "finetune", "--json", *words],
        env=LAUNCHED,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert child.returncode == 0, child.stderr
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    _header, *steps, end = lines
    one = smedjan.finetune(replace(config, out=config.out.with_name("one")))
    assert end["weights_sha256"] == one.weights_sha256
    assert [step["loss"] for step in steps] == [event["loss"] for event in read_log(one.run_dir).steps]


@pytest.mark.parametrize(
    ("rank", "hosts", "field"),
    [
        ("1", None, "MLX_HOSTFILE"),
        ("1", "nowhere.json", "MLX_HOSTFILE"),
        ("1", "{}", "MLX_HOSTFILE"),
        ("one", '[["a:1"], ["b:1"]]', "MLX_RANK"),
        ("2", '[["a:1"], ["b:1"]]', "MLX_RANK"),
    ],
)
def test_an_environment_that_mlx_launch_does_not_make(monkeypatch, tmp_path, rank, hosts, field):
    for name in ("RANK", "WORLD_SIZE", "MLX_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLX_RANK", rank)
    if hosts is not None:
        (tmp_path / "hosts.json").write_text(hosts)
        monkeypatch.setenv("MLX_HOSTFILE", hosts if hosts.endswith(".json") else str(tmp_path / "hosts.json"))
    with pytest.raises(ConfigError) as raised:
        rank_and_world()
    assert raised.value.field == field
    assert "mlx.launch" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not first()


def test_a_ring_of_one_is_one_process(monkeypatch, tmp_path):
    (tmp_path / "hosts.json").write_text('[["127.0.0.1:1"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    monkeypatch.setenv("MLX_RANK", "0")
    assert rank_and_world() == (0, 1)
    assert first()


def test_buckets_hold_whole_arrays():
    specs = {"a": ((3,), "float32"), "b": ((2, 2), "bfloat16"), "c": ((20,), "float32"), "d": ((), "float32")}
    assert list(buckets(specs, 8)) == [["a", "b"], ["c"], ["d"]]
