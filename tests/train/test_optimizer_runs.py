"""Runs with each optimizer: they learn, and a stopped one goes on to the same bits; Sophia's labels are the model's."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import smedjan
from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.errors import ConfigError
from smedjan.train.config import OptimConfig
from smedjan.train.hessian import draw
from smedjan.train.optimizers import optimizer
from smedjan.train.parts import Finetune

RATES = {"muon": 2e-3, "lion": 1e-3, "adafactor": 1e-2, "sophia": 3e-3}
STATE = {
    "muon": {"momentum_buffer", "exp_avg", "exp_avg_sq"},
    "lion": {"exp_avg"},
    "adafactor": {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
    "sophia": {"exp_avg", "hessian"},
}
LORA = {"method": "lora", "lora__rank": 4, "lora__dropout": 0.1}
CASES = [("cpu_native", name, {}) for name in RATES] + [("torch_reference", name, LORA) for name in ("muon", "sophia")]


@pytest.mark.parametrize(
    ("backend", "name", "flags"), CASES, ids=lambda value: value if isinstance(value, str) else len(value)
)
def test_a_stopped_run_goes_on_to_the_same_bits(configure, read_log, backend, name, flags):
    given = {"backend": backend, "optim__name": name, "optim__lr": RATES[name], **flags}
    if name == "sophia":
        given["optim__hessian_every"] = 2
    config = configure("whole", train__steps=8, train__save_every=3, **given)
    stopped = replace(config, out=config.out.with_name("stopped"), resume=True)

    def on_step(event):
        if event.get("step") == 4:
            shutil.copytree(config.out, stopped.out)

    whole = smedjan.finetune(config, on_step=on_step)
    kinds = {name.partition(".")[0] for name in load_checkpoint(config.out).optimizer}
    assert kinds == (
        STATE[name] if not flags else STATE[name] - {"exp_avg_sq"} - ({"exp_avg"} if name == "muon" else set())
    )
    assert smedjan.finetune(stopped).weights_sha256 == whole.weights_sha256
    losses = [step["loss"] for step in read_log(config.out).steps]
    assert flags or losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize(("name", "backend"), [*((name, "mlx_metal") for name in RATES), ("sophia", "cuda_triton")])
def test_other_backends_take_the_same_steps(configure, read_log, backend, name):
    """Losses as on the exact backend, but for rounding; of Muon to the bfloat16 of its iteration. cuda_triton, whose
    interpreter takes seconds a step, with Sophia alone: its gradients lie where the estimate's do."""
    steps = 2 if backend == "cuda_triton" else 3
    losses = []
    for on in ("torch_reference", backend):
        flags = {"backend": on, "optim__name": name, "optim__lr": RATES[name], "train__batch_size": 1}
        run = smedjan.finetune(configure(on, train__steps=steps, optim__schedule="constant", optim__warmup=0, **flags))
        losses.append([step["loss"] for step in read_log(run.run_dir).steps])
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=2.0**-8 if name == "muon" else 1e-4)


def test_labels_are_drawn_from_the_softmax():
    """A chi-square of 20,000 draws from one row, 7 degrees of freedom: above 40 once in a million."""
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.0], dtype=np.float32)
    count = 20_000
    found = np.bincount(draw(np.tile(logits, (count, 1)), (7, 0, 3, 0)), minlength=8)
    expected = count * np.exp(logits) / np.exp(logits).sum()
    assert ((found - expected) ** 2 / expected).sum() < 40
    rows = np.tile(logits, (100, 1))
    first = draw(rows, (7, 0, 3, 0))
    assert (first == draw(rows, (7, 0, 3, 0))).all()
    for key in ((8, 0, 3, 0), (7, 1, 3, 0), (7, 0, 4, 0), (7, 0, 3, 1)):
        assert (first != draw(rows, key)).any()


def test_the_estimate_is_the_gradient_of_drawn_labels(configure, peer_trainer, tiny):
    """Against autograd over transformers' model: B g^2 of the mean loss of labels drawn from its logits."""
    config = configure(optim__name="sophia", train__steps=2, train__batch_size=2)
    parts = Finetune(config)
    trainer = parts.trainer()
    [batch] = parts.steps.batches_for_step(0)
    key = (0, 0, 1, 0)
    labels = batch.labels.copy()
    labels.reshape(-1)[batch.loss_rows] = draw(trainer.session.trained_logits(batch), key)
    assert (labels != batch.labels).any()
    made = trainer.hessian.estimate(trainer.session, trainer.state, batch, key=key)
    peer = peer_trainer(tiny, torch.float32, lr=1.0, clip=0.0)
    peer.backward([replace(batch, labels=labels)])
    for name, gradient in peer.gradients().items():
        raw = trainer.session.backend.to_raw(made[f"hessian.{name}"])
        found = torch.from_numpy(to_float32(raw).reshape(raw.shape).copy())
        expected = torch.zeros_like(gradient).addcmul_(gradient, gradient, value=(1 - 0.99) * batch.trained_tokens)
        assert torch.equal(found, expected), name


def test_flags_of_other_optimizers_are_refused():
    with pytest.raises(ConfigError, match=r"optim.momentum: adamw has none; .*--optim.name muon"):
        OptimConfig(momentum=0.9)
    with pytest.raises(ConfigError, match=r"optim.eps: lion has none"):
        OptimConfig(name="lion", eps=1e-6)
    with pytest.raises(ConfigError, match=r"optim.lr: .*original.* give --optim.lr"):
        OptimConfig(name="muon", muon_adjust="original")
    with pytest.raises(ConfigError, match=r"optim.adamw_lr: is for muon"):
        OptimConfig(adamw_lr=1e-3)
    assert (OptimConfig(name="lion").beta2, OptimConfig().beta2, OptimConfig(name="sophia").beta1) == (
        0.99,
        0.999,
        0.965,
    )


def test_muon_leaves_embeddings_head_and_vectors_to_adamw():
    optim = OptimConfig(name="muon", lr=1e-2, adamw_lr=1e-3)
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    made = optimizer(optim, 1e-2, names, apart=("model.embed_tokens", "lm_head"), ema=0.0)
    specs = dict.fromkeys(names, ((6, 4), "float32")) | {"model.norm.weight": ((4,), "float32")}
    kinds = {name: [key.partition(".")[0] for key in made.state({name: spec})] for name, spec in specs.items()}
    assert kinds.pop("model.layers.0.mlp.up_proj.weight") == ["momentum_buffer"]
    assert set(map(tuple, kinds.values())) == {("exp_avg", "exp_avg_sq")}
    assert made.learning_rates(1e-2, specs) == {"lr": 1e-2, "lr.0.1": pytest.approx(1e-3)}
