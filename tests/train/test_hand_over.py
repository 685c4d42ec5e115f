"""One run on several backends: a checkpoint of any kind of run is the same bits in the arrays of each of them, the run
directory says with what flags the run goes on, and what cannot go on is one line with the flag and the remedy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import smedjan
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.run_dir import load_checkpoint, sha256_of
from smedjan.cli import app
from smedjan.errors import BackendError, CheckpointError, ConfigError
from smedjan.hf import new_tokens
from smedjan.optim import base
from smedjan.report.history import history
from smedjan.runtime import select
from smedjan.train import adapter, kept
from smedjan.train.config import FinetuneConfig
from smedjan.train.parts import Finetune

BACKENDS = ("torch_reference", "cpu_native", "mlx_metal", "cuda_triton")
BFLOAT16 = {"dtype": "bfloat16"}
BY_CHANCE = {**BFLOAT16, "optim__master": False, "optim__rounding": "stochastic"}

KINDS = {
    "packed, accumulated": {"train__packing": True, "train__grad_accum": 2},
    "masters, a mean of them": {**BFLOAT16, "train__ema": 0.9},
    "bfloat16 alone": {**BFLOAT16, "optim__master": False},
    "frozen embedding": {"train__freeze": "embed_tokens"},
    "noise, smoothing": {"train__neftune": 5, "train__label_smoothing": 0.1, "train__z_loss": 1e-4},
    "new tokens": {"train__new_tokens": "<|a|>,<|b|>", "method": "lora"},
    "dropout": {"method": "lora", "lora__dropout": 0.1, "lora__rank": 4},
    "dora": {"method": "lora", "lora__dora": True},
    "pissa": {"method": "lora", "lora__init": "pissa", "lora__rank": 4},
    "nf4": {"method": "qlora", **BFLOAT16},
    "int8": {"method": "qlora", "lora__bits": 8},
    "muon": {"optim__name": "muon"},
    "lion": {"optim__name": "lion"},
    "adafactor": {"optim__name": "adafactor"},
    "sophia": {"optim__name": "sophia"},
    "8-bit state": {"optim__state": "8bit"},
    "bfloat16 state": {"optim__state": "bfloat16"},
    "rounded by chance": BY_CHANCE,
}


class Stop(Exception):
    """Raised by a test's `on_step`."""


@pytest.fixture
def stopped(configure, monkeypatch):
    """The config of a run that a crash ended as its third and last step was logged, behind a checkpoint of step 2."""
    monkeypatch.setattr(base, "EIGHT_BIT_FROM", 256)  # so that a tiny model has such state

    def make(backend="torch_reference", out="run", **flags):
        config = configure(out, backend=backend, train__steps=3, train__save_every=1, train__batch_size=2, **flags)

        def on_step(event):
            if event["step"] == 3 and "loss" in event:
                raise Stop

        with pytest.raises(Stop):
            smedjan.finetune(config, on_step=on_step)
        return config

    return make


def bits(weights, optimizer):
    return sha256_of(weights), sha256_of(optimizer)


def taken_over(config, backend):
    """What a backend's own arrays hold of a run's checkpoint."""
    found = load_checkpoint(config.out)
    parts = Finetune(replace(config, backend=backend, resume=True), started=found.state["started"])
    if parts.starts_apart:
        parts.start = adapter.read_start(config.out)
    trainer = parts.trainer()
    trainer.restore(found.weights, found.optimizer)
    assert bits(found.weights, found.optimizer) == bits(trainer.weights(), trainer.optimizer_state())
    return found


def refusal(config):
    """The error of a backend that lacks ops of the run's optimizer."""
    try:
        _ = Finetune(config).outline.update
    except BackendError as error:
        return error
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_takes_over_every_kind_of_run(stopped, kind):
    """Bit for bit, there and back; a backend without the ops says so, and the run stays what it was."""
    config = stopped(**KINDS[kind])
    step = load_checkpoint(config.out).step
    for backend in BACKENDS:
        moved = replace(config, backend=backend, resume=True, out=config.out.with_name(backend))
        shutil.copytree(config.out, moved.out)
        if refused := refusal(moved):
            assert refused.field in ("optim.state", "optim.rounding")
            assert backend not in ("torch_reference", "cpu_native"), "the remedy names them"
            with pytest.raises(BackendError, match="go on with --backend torch_reference or cpu_native"):
                smedjan.finetune(moved)
            assert load_checkpoint(moved.out).step == step
            continue
        assert taken_over(config, backend).step == step == 2
        if backend != "cuda_triton":  # Triton's interpreter takes seconds a step: `test_relay` has them
            assert smedjan.finetune(moved).steps == 3
            assert taken_over(moved, "torch_reference").step == 3


@pytest.mark.parametrize(
    ("flags", "field", "remedy"),
    [
        ({"optim__state": "8bit"}, "optim.state", "--backend torch_reference or cpu_native"),
        (BY_CHANCE, "optim.rounding", "--backend torch_reference or cpu_native"),
        ({"method": "lora", "train__int8_forward": True}, "train.int8_forward", "--backend cpu_native"),
    ],
    ids=["8bit", "by chance", "int8 forward"],
)
def test_what_cannot_go_on_is_one_line(stopped, configure, monkeypatch, capsys, flags, field, remedy):
    """By the command: exit code 2, the flag that asked for it, and no remedy that the run would refuse."""
    table = select.backend("mlx_metal").rules
    for op in ("quantize_blocks", "dequantize_blocks", "stochastic_round"):
        monkeypatch.delitem(table._rules, op, raising=False)  # whether it has them is told elsewhere
    config = stopped(**flags)
    capsys.readouterr()
    assert app.run(["finetune", "--resume", "--out", str(config.out), "--backend", "mlx_metal"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"smedjan: {field}: the run was started with it, and mlx_metal has no" in said
    assert said.rstrip().endswith(f"go on with {remedy}")
    with pytest.raises((BackendError, ConfigError), match="or leave it out"):
        smedjan.finetune(configure("new", backend="mlx_metal", **flags))


def test_the_directory_and_a_backend_are_enough(stopped, capsys):
    """`finetune --resume --out DIR --backend other`: the run's own flags, to its own end."""
    flags = {"method": "lora", "lora__rank": 4, "lora__dropout": 0.1, "optim__weight_decay": 0.01}
    config = stopped("cpu_native", **flags)
    assert app.run(["finetune", "--resume", "--out", str(config.out), "--backend", "mlx_metal", "--json"]) == 0
    header, step, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (header["header"]["backend"], step["step"], last["steps"]) == ("mlx_metal", 3, 3)
    assert header["header"]["config_hash"] == config.config_hash()
    assert [leg["backend"] for leg in load_checkpoint(config.out).state["history"]] == ["cpu_native", "mlx_metal"]
    went = FinetuneConfig.from_toml(None, {"out": str(config.out)}, kept=kept.file_of(config.out))
    assert (went.backend, went.decided()) == ("mlx_metal", config.decided())
    first, second = history(config.out).legs
    assert (first.backend, first.first_step, first.last_step) == ("cpu_native", 1, 2)
    assert (second.backend, second.first_step, second.last_step, second.again) == ("mlx_metal", 3, 3, 1)
    assert second.first_loss == step["loss"]


def test_the_backend_of_the_machine_that_it_left(stopped, monkeypatch, capsys):
    config = stopped("mlx_metal")
    monkeypatch.setattr(select, "_made", {})
    monkeypatch.setattr(select, "find_spec", lambda package: None)
    capsys.readouterr()
    assert app.run(["finetune", "--resume", "--out", str(config.out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("smedjan: backend: mlx_metal needs the package mlx; pip install")
    assert said.endswith(", or go on with another --backend\n")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(configure, capsys):
    config = configure(train__steps=2, train__save_every=0)

    def on_step(event):
        if "loss" in event:
            raise Stop

    with pytest.raises(Stop):
        smedjan.finetune(config, on_step=on_step)
    assert app.run(["finetune", "--resume", "--out", str(config.out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["weights_sha256"] == smedjan.finetune(replace(config, out=config.out.with_name("whole"))).weights_sha256


def test_flags_and_a_file_win_over_those_of_the_run(stopped, tmp_path):
    config = stopped(train__eval_every=7)
    (tmp_path / "more.toml").write_text("[train]\nsave_every = 5\neval_every = 6\n")
    given = {"out": str(config.out), "resume": True, "train.eval_every": "4"}
    found = kept.configured(tmp_path / "more.toml", given)
    assert (found.train.save_every, found.train.eval_every, found.train.steps) == (5, 4, 3)
    assert found.decided() == config.decided()
    by_epochs = kept.configured(None, {"out": str(config.out), "resume": True, "train.epochs": 1})
    assert (by_epochs.train.steps, by_epochs.train.epochs) == (None, 1.0)
    with pytest.raises(ConfigError, match="model: is missing"):
        kept.configured(None, {"out": str(config.out)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optim__lr": 2e-2}, "optim.lr: is 0.02, and the run was started with another, 0.01"),
        ({"train__packing": True}, "train.packing: is true, and the run was started with another, false"),
        ({"train__ema": 0.5}, "train.ema: is 0.5, and the run was started with another, not given"),
        ({"method": "lora"}, "method: is lora, and the run was started with another, full"),
        ({"train__freeze": "norm,layers.0"}, "train.freeze: is norm,layers.0, and the run was started with another"),
    ],
)
def test_another_flag_is_named(stopped, change, said):
    config = stopped()
    flags = {name.replace("__", "."): value for name, value in change.items()}
    with pytest.raises(ConfigError) as raised:
        smedjan.finetune(kept.configured(None, {"out": str(config.out), "resume": True, **flags}))
    assert said in str(raised.value)
    assert str(raised.value).startswith(str(kept.file_of(config.out)))
    assert "leave --" in str(raised.value)


@pytest.mark.parametrize("damage", ["{", "[]", '{"optim": {"lrr": 1}}', '{"model": "m", "data": "d", "seed": "x"}'])
def test_damaged_flags_are_one_line(stopped, damage):
    config = stopped()
    kept.file_of(config.out).write_text(damage)
    with pytest.raises(ConfigError) as raised:
        kept.configured(None, {"out": str(config.out), "resume": True})
    assert str(raised.value).startswith(str(kept.file_of(config.out)))
    assert "\n" not in str(raised.value)


def test_a_run_of_an_older_version_goes_on(stopped):
    """It kept no flags: they are given again, and its state says whether they are the same."""
    config = stopped()
    kept.file_of(config.out).unlink()
    with pytest.raises(CheckpointError, match="another config_hash"):
        smedjan.finetune(replace(config, resume=True, optim=replace(config.optim, lr=1.0)))
    assert smedjan.finetune(replace(config, resume=True)).steps == 3


@pytest.mark.parametrize("method", ["full", "lora"])
def test_new_tokens_of_another_processor(stopped, configure, monkeypatch, method):
    """Their rows come of a matrix product, whose last bits are the library's: those of the checkpoint count."""
    flags = {"train__new_tokens": "<|a|>", "method": method}
    config, drawn = stopped(**flags), new_tokens.grown

    def elsewhere(old, vocab, first, generator):
        made = drawn(old, vocab, first, generator)
        rows = np.frombuffer(made.data, np.float32).reshape(made.shape).copy()
        rows[first:] = np.nextafter(rows[first:], np.float32(np.inf))
        return RawTensor.of(rows)

    monkeypatch.setattr(new_tokens, "grown", elsewhere)
    resumed = smedjan.finetune(replace(config, resume=True))
    monkeypatch.undo()
    whole = configure("whole", train__steps=3, train__save_every=1, train__batch_size=2, **flags)
    assert resumed.weights_sha256 == smedjan.finetune(whole).weights_sha256
