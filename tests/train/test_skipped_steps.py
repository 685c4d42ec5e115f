"""A run with steps whose gradients are not finite: they are counted and shown, the rest is as without them, a stopped
run goes on to the same bits, and too many in a row end it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

import smedjan
from smedjan.checkpoint.run_dir import sha256_of
from smedjan.errors import ConfigError
from smedjan.runtime.session import Session
from smedjan.train.parts import Finetune

POISONED = 3


@pytest.fixture
def overflow(monkeypatch):
    """An infinite gradient in the micro-batches of some steps, told by the dropout key that has the step's number."""
    micro = Session.micro

    def poison(*steps):
        def poisoned(self, *given, dropout_key=(0, 0, 0, 0), **named):
            loss, grads = micro(self, *given, dropout_key=dropout_key, **named)
            if dropout_key[2] in steps:
                next(iter(grads.values())).view(-1)[0] = float("inf")
            return loss, grads

        monkeypatch.setattr(Session, "micro", poisoned)

    return poison


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native"])
def test_a_skipped_step_is_counted_and_leaves_no_trace(configure, overflow, read_log, backend):
    overflow(POISONED)
    config = configure("whole", train__steps=6, train__save_every=4, backend=backend)
    stopped = replace(config, out=config.out.with_name("stopped"), resume=True)
    shown = []

    def on_step(event):
        shown.extend([event["skipped"]] if "loss" in event else [])
        if event["step"] == 5:
            shutil.copytree(config.out, stopped.out)

    run = smedjan.finetune(config, on_step=on_step)
    assert (run.skipped, shown) == (1, [0, 0, 1, 1, 1, 1])
    steps = read_log(config.out).steps
    assert [step["grad_norm"] is None for step in steps] == [step["step"] == POISONED for step in steps]
    assert steps[POISONED - 1]["loss"] > 0

    parts = Finetune(config)
    trainer = parts.trainer()
    left = [step for step in range(6) if step + 1 != POISONED]
    for taken, step in enumerate(left, 1):
        batches = parts.steps.batches_for_step(step)
        trainer.step(batches, number=step + 1, lr=parts.learning_rate(step), taken=taken)
    assert run.weights_sha256 == sha256_of(trainer.weights())

    resumed = smedjan.finetune(stopped)
    assert (resumed.weights_sha256, resumed.skipped) == (run.weights_sha256, 1)


def test_too_many_in_a_row_end_the_run(configure, overflow):
    overflow(2, 4, 5, 6)
    config = configure(train__steps=8, train__save_every=1, optim__max_skipped=3)
    with pytest.raises(ConfigError, match=r"3 steps in a row .* the last one step 6") as raised:
        smedjan.finetune(config)
    assert raised.value.field == "optim.lr"
    kept = json.loads((config.out / "checkpoints" / "step-00000005" / "smedjan" / "state.json").read_text())
    assert kept["progress"]["in_a_row"] == 2
    with pytest.raises(ConfigError, match="3 steps in a row"):
        smedjan.finetune(replace(config, resume=True))


@pytest.mark.parametrize("poisoned", [(4,), (3, 4)], ids=len)
def test_a_run_does_not_end_in_skipped_steps(configure, overflow, poisoned):
    overflow(*poisoned)
    config = configure(train__steps=4)
    if len(poisoned) == 1:
        assert smedjan.finetune(config).skipped == 1
        return
    with pytest.raises(ConfigError, match="2 steps in a row"):
        smedjan.finetune(config)
    assert not (config.out / "model.safetensors").exists()


def test_a_rate_that_is_far_too_high(configure):
    """Weights that overflow in the very first step give no finite norm again."""
    with pytest.raises(ConfigError, match="2 steps in a row"):
        smedjan.finetune(configure(train__steps=5, optim__lr=1e30, optim__max_skipped=2))
