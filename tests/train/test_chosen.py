"""`--train.freeze`, `--train.only`: torch's bits with requires_grad False, and nothing is spent on what is frozen."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import smedjan
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.errors import SmedjanError
from smedjan.hf.load import open_model
from smedjan.train.chosen import chosen
from smedjan.train.config import TrainConfig
from smedjan.train.parts import Finetune
from tests.conftest import assert_bits

RUN = {"train__steps": 4, "optim__schedule": "constant", "optim__warmup": 0, "optim__clip": 0.05}


def trained(name: str, kind: str) -> bool:
    """By hand, what each case trains."""
    return {
        "freeze": "embed_tokens" not in name and "layers.0." not in name,
        "only": name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"),
        "both": "layers.1." in name and "norm" not in name,
        "head": "embed_tokens" in name,
    }[kind]


CASES = {
    "freeze": {"train__freeze": "embed_tokens,layers.0"},
    "only": {"train__only": "layers.1.mlp.up_proj,model.norm"},
    "both": {"train__only": "layers.1", "train__freeze": "input_layernorm,post_attention_layernorm"},
    "head": {"train__only": "embed_tokens"},
}


@pytest.mark.parametrize("kind", CASES)
def test_the_bits_of_requires_grad_false(configure, peer_trainer, tiny, kind):
    """Every step's loss and the weights that are saved, frozen ones too; the clip's norm is of what is trained."""
    config = configure(**RUN, **CASES[kind])
    losses = []
    run = smedjan.finetune(config, on_step=lambda event: losses.extend([event["loss"]] if "loss" in event else []))
    peer = peer_trainer(tiny, torch.float32, lr=1e-2, clip=0.05)
    for name, parameter in peer.model.named_parameters():
        parameter.requires_grad_(trained(name, kind))
    steps = Finetune(config).steps
    assert losses == [peer.step(steps.batches_for_step(step)) for step in range(4)]
    ours, before = load_file(run.run_dir / "model.safetensors"), load_file(tiny / "model.safetensors")
    for name, parameter in peer.model.named_parameters():
        assert_bits(ours[name], parameter.detach(), name)
        assert torch.equal(ours[name], before[name]) != trained(name, kind), name


@pytest.mark.parametrize("on", ["torch_reference", "cpu_native", "mlx_metal"])
def test_what_is_frozen_costs_nothing(configure, on):
    """No gradient of it, no node of a block below what is trained, no optimizer state; the plan counts the rest."""
    config = configure(backend=on, dtype="bfloat16", **RUN, **CASES["only"])
    planned, whole = smedjan.plan(config), smedjan.plan(configure(backend=on, dtype="bfloat16", **RUN))
    assert planned.trained_parameters == 48 * 80 + 48
    assert planned.parameters == whole.parameters == whole.trained_parameters
    assert planned.planned_bytes < whole.planned_bytes
    assert planned.flops_per_token < 0.6 * whole.flops_per_token
    made = {row["op"] for row in planned.ops}
    assert "embedding_bwd" in {row["op"] for row in whole.ops} - made
    run = smedjan.finetune(config)
    state = load_checkpoint(run.run_dir)
    names = {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    assert set(state.weights) == names
    assert {name.partition(".")[2] for name in state.optimizer} == names


def test_a_resumed_run_makes_the_same_bits(configure):
    flags = {**RUN, **CASES["freeze"], "train__save_every": 1}
    whole = smedjan.finetune(configure("whole", **flags))

    class Stop(Exception):
        pass

    def on_step(event):
        if event["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        smedjan.finetune(configure("stopped", **flags), on_step=on_step)
    resumed = smedjan.finetune(configure("stopped", **flags, resume=True))
    assert resumed.weights_sha256 == whole.weights_sha256
    with pytest.raises(SmedjanError, match=r"train\.(only|freeze): is .*, and the run was started with another"):
        smedjan.finetune(configure("stopped", **{**flags, "train__freeze": "embed_tokens"}, resume=True))


@cache
def names_of(directory):
    files = open_model(directory)
    return list(files.tensors), files.config.tied()


BAD = [
    ("full", "freeze", "layers.7", "no parameter has 'layers.7' in its name"),
    ("full", "freeze", "layer", "no parameter has 'layer' in its name"),
    ("full", "only", "q_pro", "no parameter has 'q_pro' in its name"),
    ("full", "freeze", "lm_head", "'lm_head' is tied to model.embed_tokens.weight in this model; give embed_tokens"),
    ("full", "freeze", "model", "every parameter is frozen"),
    ("lora", "freeze", "layers.0", "is for the method full, not lora"),
    ("qlora", "only", "layers.0", "is for the method full, not qlora"),
]


@pytest.mark.parametrize(("method", "flag", "pattern", "message"), BAD)
def test_mistakes_are_one_line(configure, tmp_path, method, flag, pattern, message):
    with pytest.raises(SmedjanError) as raised:
        smedjan.finetune(configure(method=method, **{f"train__{flag}": pattern}))
    assert raised.value.field == f"train.{flag}"
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_only_less_freeze(tiny):
    names, tied = names_of(tiny)
    kept = chosen(names, TrainConfig(only=("mlp",), freeze=("layers.0",)), tied)
    assert kept == [name for name in names if ".1.mlp." in name]
    assert chosen(names, TrainConfig(), tied) == names


def test_the_frozen_weights_are_written_as_they_were(configure, tiny):
    """A run in bfloat16 of a float32 model rounds frozen weights as it rounds all."""
    run = smedjan.finetune(configure(dtype="bfloat16", **RUN, **CASES["head"]))
    saved, before = load_file(run.run_dir / "model.safetensors"), load_file(tiny / "model.safetensors")
    assert json.loads((run.run_dir / "config.json").read_text())["dtype"] == "bfloat16"
    for name, weight in before.items():
        if "embed" not in name:
            assert torch.equal(saved[name], weight.to(torch.bfloat16)), name
