"""Issue 3, Shows: "One training run of 20 steps on a tiny Llama on the three lowerings: first-step gradients within the
derived bound, curves within twice the spread that `transformers` shows between float32 and float64; a run stopped at
step 10 on one lowering goes on from its directory on another." The fast CPU backend, a fourth, is held to the same."""

from __future__ import annotations

import json
import shutil
from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch

import smedjan
from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.train.config import FinetuneConfig
from smedjan.train.parts import Finetune
from tests.tolerances import assert_close

LOWERINGS = ("torch_reference", "mlx_metal", "cuda_triton")
BACKENDS = (*LOWERINGS, "cpu_native")
STEPS, STOP, LR, CLIP = 20, 10, 1e-3, 1.0


@pytest.fixture(scope="module")
def run_config(tiny, tmp_path_factory):
    """20 steps at one rate, full fine-tuning in float32, a checkpoint after step 10. Triton's interpreter needs seconds
    a step, so the rows are short."""
    root = tmp_path_factory.mktemp("lowerings")
    rows = root / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"hello {i} ", "completion": f"w {i % 3}"}) + "\n" for i in range(40))
    )

    def make(out, backend, resume=False):
        flags = {
            "model": str(tiny),
            "data": str(rows),
            "out": str(root / out),
            "method": "full",
            "backend": backend,
            "resume": resume,
            "train.batch_size": 1,
            "train.steps": STEPS,
            "train.save_every": STOP,
            "optim.lr": LR,
            "optim.clip": CLIP,
            "optim.schedule": "constant",
            "optim.warmup": 0,
        }
        return FinetuneConfig.from_toml(None, flags)

    return make


@pytest.fixture(scope="module")
def curves(run_config, tiny, peer_trainer):
    """transformers' losses in float64, and the most by which its float32 losses are away from them in 20 steps."""
    steps = Finetune(run_config("unused", "torch_reference")).steps
    made = []
    for dtype in (torch.float64, torch.float32):
        trainer = peer_trainer(tiny, dtype, lr=LR, clip=CLIP)
        made.append(np.array([trainer.step(steps.batches_for_step(step)) for step in range(STEPS)]))
    return made[0], float(np.abs(made[1] - made[0]).max())


@pytest.fixture(scope="module")
def whole(run_config):
    """Losses of a whole run on a backend. A copy is taken as step 11 is logged, as of a run killed there."""

    @cache
    def run(backend):
        config, losses = run_config(backend, backend), []

        def on_step(event):
            if "loss" not in event:
                return
            losses.append(event["loss"])
            if event["step"] == STOP + 1:
                shutil.copytree(config.out, run_config(f"{backend}-stopped", backend).out)

        smedjan.finetune(config, on_step=on_step)
        return np.array(losses)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_gradients(run_config, peer_trainer, tiny, backend):
    parts = Finetune(run_config("unused", backend))
    [batch] = parts.steps.batches_for_step(0)
    reference, plain = (peer_trainer(tiny, dtype, lr=LR, clip=CLIP) for dtype in (torch.float64, torch.float32))
    reference.backward([batch])
    plain.backward([batch])
    truth, theirs = reference.gradients(), plain.gradients()
    session = parts.trainer().session
    _, grads = session.micro(batch, list(truth), num_items=batch.trained_tokens)
    for name in truth:
        raw = session.backend.to_raw(grads[name])
        gradient = torch.from_numpy(to_float32(raw).reshape(raw.shape).copy())
        assert_close(f"{backend}: {name}", gradient, truth[name], theirs[name])


def assert_within_spread(name, losses, curves):
    truth, spread = curves
    assert len(losses) == STEPS
    off = float(np.abs(losses - truth).max())
    assert off <= 2 * spread, f"{name}: {off:.3e} away, twice the spread is {2 * spread:.3e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_curve(whole, curves, backend):
    losses = whole(backend)
    assert losses[-1] < 0.7 * losses[0], "it learns"
    assert_within_spread(backend, losses, curves)


# Triton's interpreter takes seconds a step: one way onto it is in every run of the tests, the other one is slow
HAND_OVERS = [
    pytest.param(*pair, marks=pytest.mark.slow if pair == ("mlx_metal", "cuda_triton") else ())
    for pair in permutations(LOWERINGS, 2)
]


@pytest.mark.parametrize(("first", "second"), HAND_OVERS)
def test_stopped_on_one_goes_on_on_another(run_config, whole, curves, first, second):
    """Ten steps on the first, the rest on the second from its directory, within the bound all along."""
    before = whole(first)[:STOP]
    config = run_config(f"{first}-{second}", second, resume=True)
    shutil.copytree(run_config(f"{first}-stopped", first).out, config.out)
    seen = []
    smedjan.finetune(config, on_step=seen.append)
    assert seen.pop(0)["header"]["steps"]["done"] == STOP
    assert [event["step"] for event in seen] == list(range(STOP + 1, STEPS + 1))
    assert_within_spread(f"{first}, then {second}", np.array([*before, *(event["loss"] for event in seen)]), curves)
    log = map(json.loads, (config.out / "smedjan" / "log.jsonl").read_text().splitlines())
    assert [event["step"] for event in log if "loss" in event] == list(range(1, STEPS + 1))
    state = load_checkpoint(config.out).state
    assert [(leg["backend"], leg["from_step"]) for leg in state["history"]] == [(first, 0), (second, STOP)]
