"""PiSSA's start is peft's, and its adapters come and go: peft's load here with or without their conversion, ours are
plain ones that peft lays beside the base as it is stored (Shows: "PiSSA adapters load in `peft`")."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import smedjan
from smedjan.checkpoint.raw import RawTensor
from smedjan.errors import SmedjanError
from smedjan.hf import pissa
from smedjan.hf.load import open_model
from smedjan.hf.peft import read_adapter
from smedjan.passes.lora import Lora, a_name, b_name
from tests.tolerances import assert_close, assert_near

IDS = np.array([[5, 17, 88, 3, 250, 9, 41], [7, 7, 120, 66, 2, 31, 299]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = Lora(rank=4, alpha=12.0, dropout=0.0, targets=tuple(TARGETS))


def their_model(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")


def their_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits


def torch_of(raw: RawTensor) -> torch.Tensor:
    return torch.from_numpy(pissa.values(raw).copy())


@pytest.mark.parametrize("rslora", [False, True])
def test_the_start_is_pefts(model_directory, rslora):
    """Factors and residual of every target, each as near to those of a float64 SVD as peft's; signs may differ."""
    base = model_directory()
    lora = Lora(rank=4, alpha=12.0, dropout=0.0, targets=tuple(TARGETS), rslora=rslora)
    files = open_model(base)
    start = pissa.initial(lora, files.tensors, "pissa", 0)
    left = pissa.residual(lora, files.tensors, start)
    settings = LoraConfig(
        r=4, lora_alpha=12, target_modules=TARGETS, init_lora_weights="pissa", use_rslora=rslora, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(their_model(base), settings)
    modules = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert len(modules) == 6
    for name, module in modules.items():
        ours = name.removeprefix("base_model.model.")
        weight, scaling = torch_of(files.tensors[f"{ours}.weight"]), lora.scaling_of(ours)
        assert scaling == module.scaling["default"]
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        top = (u[:, :4] * s[:4]) @ vt[:4]
        a, b = torch_of(start[a_name(ours)]), torch_of(start[b_name(ours)])
        their_a, their_b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
        assert_close("product", scaling * b @ a, top, scaling * their_b @ their_a, scale=float(s[0]))
        plain = module.base_layer.weight.detach()
        assert_close("residual", torch_of(left[f"{ours}.weight"]), weight.double() - top, plain, scale=float(s[0]))
        assert_close("balance", a.square().sum(1), s[:4] / scaling, their_a.square().sum(1))
        assert_close("balance", b.square().sum(0), s[:4] / scaling, their_b.square().sum(0))
        assert (a.abs().amax(1) == a.amax(1)).all(), "the largest of each row is positive"
    untouched = next(name for name in left if "k_proj" in name)
    assert left[untouched].data == files.tensors[untouched].data


def test_few_rounds_come_near():
    """svd_lowrank closes in on the SVD with its rounds, whichever side is longer: each takes the rest down by about the
    squared ratio of the 7th singular value to the 6th, here 1/100."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(48, 20, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(32, 20, generator=generator, dtype=torch.float64))
    s = torch.tensor([2.0, 1.8, 1.6, 1.4, 1.2, 1.0, *[0.1] * 14], dtype=torch.float64)
    wide, top = (u * s) @ v.T, (u[:, :6] * s[:6]) @ v[:, :6].T
    for weight, wanted in ((wide.float(), top), (wide.float().T, top.T)):
        off = []
        for rounds in (0, 1, 2):
            a, sigma, bt = pissa.svd_lowrank(weight.numpy(), 6, rounds, np.random.default_rng(0))
            off.append(float((torch.from_numpy((a * sigma) @ bt).double() - wanted).norm()))
        assert off[0] > 10 * off[1] > 100 * off[2]


def test_the_seed_decides_a_randomised_start(model_directory):
    files = open_model(model_directory())
    first, same, other = (pissa.initial(LORA, files.tensors, "pissa_niter_1", seed) for seed in (0, 0, 1))
    assert all(first[name].data == same[name].data for name in first)
    assert all(first[name].data != other[name].data for name in first)


def test_a_rank_that_the_weight_does_not_have(model_directory):
    files = open_model(model_directory())
    with pytest.raises(SmedjanError, match=r"33 is more than the 32 singular values of model\.layers\.0\."):
        pissa.initial(Lora(rank=33, alpha=1.0, dropout=0.0, targets=("v_proj",)), files.tensors, "pissa", 0)


@pytest.fixture
def from_peft(model_directory, tmp_path):
    """(base, the adapter saved as it is, the same converted to plain LoRA, the logits of what was trained, those of
    its adapters over the residual of a float64 SVD)"""
    base = model_directory()
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(their_model(base), settings)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(tmp_path / "raw")
    trained = their_logits(model)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    weights = their_model(base).double().state_dict()
    for name, module in model.double().named_modules():
        if hasattr(module, "lora_A"):
            weight = weights[f"{name.removeprefix('base_model.model.')}.weight"]
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            module.base_layer.weight.data = weight - (u[:, :4] * s[:4]) @ vt[:4]
    return base, tmp_path / "raw", tmp_path / "converted", trained, their_logits(model)


def test_pefts_adapters_here(from_peft):
    """One that was not converted means, to peft too, the residual of the base it is loaded over."""
    base, raw, converted, trained, reference = from_peft
    theirs = their_logits(PeftModel.from_pretrained(their_model(base), converted))
    for adapter in (raw, converted):
        ours = torch.from_numpy(smedjan.load(base, adapter=adapter, backend="torch_reference").logits(IDS))
        assert_near(adapter.name, ours, reference, trained)
    assert torch.equal(ours, theirs)
    assert_near("peft loads it so", their_logits(PeftModel.from_pretrained(their_model(base), raw)), reference, trained)
    lora, tensors = read_adapter(raw, open_model(base).tensors)
    assert (lora.rank, lora.alpha, lora.scaling_of("q_proj")) == (8, 24.0, 3.0)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in read_adapter(converted, {})[1].items()
    }


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "loftq"])
def test_a_start_that_cannot_be_made_again_is_refused(from_peft, init):
    base, raw, *_ = from_peft
    file = raw / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": init}))
    with pytest.raises(SmedjanError, match=f"init_lora_weights: '{init}' is not supported"):
        smedjan.load(base, adapter=raw, backend="torch_reference")
