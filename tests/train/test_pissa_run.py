"""Runs that start from PiSSA: what is saved is a plain adapter of the base as it is stored, and a resumed run goes on
over the very residual that it started with."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smedjan
from smedjan.checkpoint import nf4
from smedjan.errors import CheckpointError
from smedjan.hf import pissa
from smedjan.hf.load import open_model
from smedjan.passes.lora import Lora
from smedjan.train.parts import Finetune
from tests.tolerances import assert_near

IDS = [[5, 9, 30, 31, 7, 2]]
PISSA = {"method": "lora", "lora__init": "pissa", "lora__rank": 4, "lora__alpha": 8, "train__steps": 3}


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits


@pytest.mark.parametrize("extra", [{}, {"lora__rslora": True, "lora__rank_pattern": "v_proj=2"}], ids=["", "rslora"])
def test_the_saved_adapter_is_of_the_base_as_it_is_stored(configure, tiny, extra):
    """Rank 2 r over the base, here and in peft, is within bound of rank r over the residual, which was trained."""
    run = smedjan.finetune(configure(**PISSA, **extra))
    config = json.loads((run.run_dir / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ours = torch.from_numpy(smedjan.load(run.run_dir, backend="torch_reference").logits(IDS))
    assert torch.equal(ours, logits(PeftModel.from_pretrained(base, run.run_dir)))

    parts = Finetune(configure(**PISSA, **extra))
    trainer = parts.trainer()
    (checkpoint,) = (run.run_dir / "checkpoints").iterdir()
    trained = load_file(checkpoint / "adapter_model.safetensors")
    trainer.session.parameters.update(trained)
    plain = trainer.session.logits(smedjan.api._batch(IDS, None, None, 280))
    wide = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    reference = logits(PeftModel.from_pretrained(wide, run.run_dir).double())
    assert_near("logits", ours, reference, plain)
    before = logits(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    assert float((ours - before).abs().max()) > 1e-2, "three steps changed something"


def test_it_starts_as_the_base(configure, tiny):
    """Residual and adapters add up to the weights; the gradient of A is not zero, unlike that of a plain start."""
    trainer = Finetune(configure(**PISSA)).trainer()
    batch = smedjan.api._batch(IDS, None, IDS, 280)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    lora = trainer.session.lora
    # As near to the float64 model as the residual lets it be: peft's own start, over its own residual.
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa")
    theirs, reference = logits(get_peft_model(deepcopy(model), settings)), logits(model.double())
    assert_near("logits", trainer.session.logits(batch), reference, theirs)
    _, grads = trainer.session.micro(batch, trainer.names, num_items=5)
    assert all(float(grads[name].abs().max()) > 0 for name in trainer.names)
    assert lora == Lora(rank=4, alpha=8.0, dropout=0.0, targets=open_model(tiny).config.linear_layers())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2"])
def test_a_resumed_run_makes_the_same_bits(configure, init):
    flags = {**PISSA, "lora__init": init, "train__steps": 4, "train__save_every": 1, "backend": "cpu_native"}
    whole = smedjan.finetune(configure("whole", **flags))

    class Stop(Exception):
        pass

    def on_step(event):
        if event["step"] == 3:
            raise Stop

    config = configure("stopped", **flags)
    with pytest.raises(Stop):
        smedjan.finetune(config, on_step=on_step)
    assert smedjan.finetune(replace(config, resume=True)).weights_sha256 == whole.weights_sha256


def test_a_resumed_run_makes_no_svd(configure, monkeypatch):
    config = configure(**PISSA)
    whole = smedjan.finetune(config)
    monkeypatch.setattr(pissa, "initial", None)
    assert smedjan.finetune(replace(config, resume=True)).weights_sha256 == whole.weights_sha256


def test_another_start_is_refused(configure):
    """Adapters of one residual mean nothing over another."""
    config = configure(**PISSA)
    smedjan.finetune(config)
    file = config.out / "smedjan" / "start.safetensors"
    start = load_file(file)
    save_file({name: tensor * 1.5 for name, tensor in start.items()}, file)
    with pytest.raises(CheckpointError, match="another start_sha256"):
        smedjan.finetune(replace(config, resume=True))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"start\.safetensors"):
        smedjan.finetune(replace(config, resume=True))


def test_qlora_quantises_the_residual(configure, tiny):
    """What is left has the smaller range: its 4 bits lose less than those of the weights (eq. 6 and 8 there)."""
    parts = Finetune(configure(**{**PISSA, "method": "qlora", "lora__rank": 16}))
    files, lost = parts.files, []
    for tensors in (files.tensors, pissa.residual(parts.lora, files.tensors, parts.start)):
        total = 0.0
        for name in files.config.linear_weights():
            raw = tensors[name]
            back = nf4.dequantize(nf4.quantize(raw), raw.shape, raw.dtype)
            total += float(np.square(pissa.values(back) - pissa.values(raw)).sum())
        lost.append(total)
    assert lost[1] < lost[0]
    run = smedjan.finetune(configure("q", **{**PISSA, "method": "qlora"}))
    assert smedjan.load(run.run_dir, backend="torch_reference").session.lora.rank == 8


def test_a_plan_makes_no_svd(configure, monkeypatch):
    monkeypatch.setattr(pissa, "initial", None)
    planned = smedjan.plan(configure(**PISSA, dry_run=True))
    assert planned.trained_parameters == smedjan.plan(configure(**{**PISSA, "lora__init": "random"})).trained_parameters
