"""A run with narrower state is stopped and goes on to the same bits."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

import smedjan
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.optim import base


@pytest.mark.parametrize(
    ("state", "rounding", "master"), [("8bit", "stochastic", False), ("bfloat16", "nearest", True)]
)
@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native", "mlx_metal"])
def test_a_stopped_run_goes_on_to_the_same_bits(configure, monkeypatch, backend, state, rounding, master):
    monkeypatch.setattr(base, "EIGHT_BIT_FROM", 256)
    flags = {"backend": backend, "optim__state": state, "optim__rounding": rounding, "optim__master": master}
    config = configure("whole", train__steps=6, train__save_every=3, dtype="bfloat16", **flags)
    stopped = replace(config, out=config.out.with_name("stopped"), resume=True)

    def on_step(event):
        if event.get("step") == 4:
            shutil.copytree(config.out, stopped.out)

    whole = smedjan.finetune(config, on_step=on_step)
    kept = load_checkpoint(stopped.out).optimizer
    stored = {"8bit": "uint8"}.get(state, state)
    assert {raw.dtype for raw in kept.values()} == {stored, "float32"}
    assert smedjan.finetune(stopped).weights_sha256 == whole.weights_sha256
