"""A run that watches its evaluation: the mean of weights that it evaluates, when it stops, and what it keeps; and an
evaluation needs no more memory than training does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

import smedjan
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.run_dir import checkpoint_of, load_checkpoint, sha256_of
from smedjan.errors import CheckpointError, ConfigError
from smedjan.hf.load import open_model
from smedjan.runtime.session import Session
from smedjan.train import finetune as module
from smedjan.train.config import TrainConfig
from smedjan.train.evaluation import batches, evaluate_loss, program_of
from smedjan.train.largest import largest_program
from smedjan.train.parts import Finetune
from smedjan.train.progress import Progress

LOSSES = [3.0, 2.0, 1.95, 2.5, 1.94, 1.0]


@pytest.fixture
def losses(monkeypatch):
    """The evaluations' losses, one after another."""

    def give(values):
        left = iter(values)
        monkeypatch.setattr(module, "evaluate_loss", lambda *given, **named: next(left))

    return give


@pytest.fixture
def watched(configure, pairs):
    def make(out, **flags):
        given = {"train__steps": 6, "train__eval_every": 1, "train__save_every": 0, "train__patience": 3} | flags
        return configure(out, eval_data=str(pairs), train__keep=1, train__min_delta=0.1, **given)

    return make


def test_a_run_stops_and_keeps_the_best(watched, losses):
    """2.0 is the best: 1.95 is lower by less than min-delta, and three evaluations later the run is over."""
    losses(LOSSES)
    config = watched("run")
    events = []
    run = smedjan.finetune(config, on_step=events.append)
    assert (run.steps, run.best_step, run.best_eval_loss, run.stopped_early) == (5, 2, 2.0, True)
    evals = [event for event in events if "eval_loss" in event]
    assert [event["stopped_early"] for event in evals] == [False] * 4 + [True]
    assert [event["best_step"] for event in evals] == [1, 2, 2, 2, 2]
    kept = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000005"]
    assert run.weights_sha256 == sha256_of(checkpoint_of(config.out, 2).weights)
    assert run.weights_sha256 != sha256_of(load_checkpoint(config.out).weights)
    assert sha256_of(open_model(config.out).tensors) == run.weights_sha256
    again = smedjan.finetune(replace(config, resume=True))
    assert (again.weights_sha256, again.steps, again.stopped_early) == (run.weights_sha256, 5, True)
    shutil.rmtree(config.out / "checkpoints" / "step-00000002")
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 is gone"):
        smedjan.finetune(replace(config, resume=True))


def test_a_resumed_run_goes_on_counting(watched, losses):
    losses(LOSSES)
    config = watched("run", train__save_every=1)
    stopped = replace(config, out=config.out.with_name("stopped"), resume=True)

    def on_step(event):
        if event["step"] == 5 and "loss" in event:
            shutil.copytree(config.out, stopped.out)

    whole = smedjan.finetune(config, on_step=on_step)
    assert json.loads((stopped.out / "smedjan" / "latest.json").read_text())["step"] == 4
    losses(LOSSES[4:])
    resumed = smedjan.finetune(stopped)
    assert (resumed.steps, resumed.best_step, resumed.weights_sha256) == (5, 2, whole.weights_sha256)


def test_without_patience_the_last_weights_stay(watched, losses):
    losses(LOSSES)
    run = smedjan.finetune(watched("run", train__patience=None))
    assert (run.steps, run.best_step, run.stopped_early) == (6, 6, False)
    assert run.weights_sha256 == sha256_of(load_checkpoint(run.run_dir).weights)


def test_a_loss_that_is_not_finite_is_never_the_best():
    progress = Progress()
    assert not progress.after_evaluation(1, float("nan"), TrainConfig(patience=2))
    assert progress.after_evaluation(2, 5.0, TrainConfig(patience=2))
    assert not progress.after_evaluation(3, float("nan"), TrainConfig(patience=2))
    assert (progress.best_step, progress.waited, progress.stopped_early) == (2, 1, False)


def test_patience_needs_something_to_watch(configure):
    with pytest.raises(ConfigError, match=r"train.patience: needs rows to evaluate on; give --eval-data"):
        configure(train__patience=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_result_and_the_evaluation_are_of_the_mean(configure, pairs, dtype):
    """The raw weights stay in the last checkpoint, the mean beside them as state; a stopped run goes on with both."""
    flags = {"train__steps": 6, "train__save_every": 3, "train__ema": 0.8, "train__keep": 2, "dtype": dtype}
    config = configure("run", eval_data=str(pairs), **flags)
    stopped = replace(config, out=config.out.with_name("stopped"), resume=True)

    def on_step(event):
        if event["step"] == 4:
            shutil.copytree(config.out, stopped.out)

    run = smedjan.finetune(config, on_step=on_step)
    kept = load_checkpoint(config.out)
    mean = {name: convert(kept.optimizer[f"ema.{name}"], raw.dtype) for name, raw in kept.weights.items()}
    assert run.weights_sha256 == sha256_of(mean) != sha256_of(kept.weights)
    parts = Finetune(config)
    trainer = parts.trainer()
    given = {"batch_size": 4, "max_length": parts.max_length}
    trainer.restore(mean, kept.optimizer)
    assert run.eval_loss == evaluate_loss(trainer.session, parts.eval_dataset, **given)
    trainer.restore(kept.weights, kept.optimizer)
    assert run.eval_loss != evaluate_loss(trainer.session, parts.eval_dataset, **given)
    assert smedjan.finetune(stopped).weights_sha256 == run.weights_sha256


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native"])
def test_an_evaluation_needs_no_more_memory_than_training(configure, write_rows, monkeypatch, backend):
    """Rows to evaluate on are four times as long as any that is trained: planned as they come they need more, and in
    the batches that a run makes of them they do not. Their loss is the same but for the order of its sum."""
    long = write_rows([{"prompt": "hello " * 8 + f"{i} ", "completion": "world " * 16} for i in range(8)], "long.jsonl")
    short = write_rows([{"prompt": "a ", "completion": f"{i % 10}"} for i in range(8)], "short.jsonl")
    lora = {"method": "lora", "lora__rank": 1, "lora__last_layers": 1}
    data = {"data": str(short), "eval_data": str(long)}
    config = configure(**data, **lora, backend=backend, train__steps=2, train__batch_size=8, train__loss_on="all")
    parts = Finetune(config)
    trainer = parts.trainer()
    session, most = trainer.session, largest_program(parts, trainer).peak_bytes
    given = {"batch_size": 8, "max_length": parts.max_length}
    [whole] = batches(session, parts.eval_dataset, **given, most_bytes=None)
    assert program_of(session, whole).peak_bytes > most
    split = list(batches(session, parts.eval_dataset, **given, most_bytes=most))
    assert len(split) > 1
    assert max(program_of(session, batch).peak_bytes for batch in split) <= most
    assert sum(len(batch.input_ids) for batch in split) == 8
    once = evaluate_loss(session, parts.eval_dataset, **given)
    assert evaluate_loss(session, parts.eval_dataset, **given, most_bytes=most) == pytest.approx(once, rel=1e-6)
    ran, micro = [], Session.micro

    def watched(session, batch, wrt, **given):
        if not wrt:
            ran.append(program_of(session, batch).peak_bytes)
        return micro(session, batch, wrt, **given)

    monkeypatch.setattr(Session, "micro", watched)
    assert smedjan.finetune(config).eval_loss is not None
    assert len(ran) == len(split)
    assert max(ran) <= most, "a run evaluates so"
