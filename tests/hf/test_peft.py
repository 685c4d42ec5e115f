"""Adapters go to and from `peft` unchanged, and `merge` is peft's `merge_and_unload` (issue 3, "PEFT's layout in and
out; merge"; Shows: "LoRA (dropout 0) adapters equal to the bit to `peft`'s")."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smedjan
from smedjan.errors import SmedjanError
from smedjan.train.config import FinetuneConfig
from tests.families import CASES, make_model
from tests.tolerances import assert_close

IDS = np.array([[5, 17, 88, 3, 250, 9, 41], [7, 7, 120, 66, 2, 31, 299]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def their_model(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")


def their_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits


DORA = {"lora.dora": True}
PISSA = {"lora.init": "pissa"}
OURS = {"lora.rslora": True, "lora.rank_pattern": "v_proj=2,layers.1.mlp.down_proj=8", "lora.alpha_pattern": "v_proj=3"}
THEIRS = {
    "use_rslora": True,
    "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 8},
    "alpha_pattern": {"v_proj": 3},
}


@pytest.fixture(
    params=[{}, OURS, DORA, {**OURS, **DORA}, PISSA, {**OURS, **DORA, **PISSA}],
    ids=["plain", "rslora and patterns", "dora", "dora, rslora and patterns", "pissa", "all of them"],
)
def trained(model_directory, tmp_path, request):
    """(base, run directory) of three steps of LoRA, with a rate that makes the adapter matter."""
    base = model_directory()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"the {i} ", "completion": "dog"}) + "\n" for i in range(8)))
    flags = {
        "model": str(base),
        "data": str(rows),
        "out": str(tmp_path / "run"),
        "method": "lora",
        "backend": "torch_reference",
        "lora.rank": 4,
        "lora.targets": ",".join(TARGETS),
        "train.steps": 3,
        "optim.lr": 5e-2,
        **request.param,
    }
    smedjan.finetune(FinetuneConfig.from_toml(None, flags))
    return base, tmp_path / "run"


@pytest.fixture(
    params=[{}, THEIRS, {"use_dora": True}, {"use_dora": True, **THEIRS}],
    ids=["plain", "rslora and patterns", "dora", "dora, rslora and patterns"],
)
def from_peft(model_directory, tmp_path, request):
    """(base, adapter directory) of a random adapter that peft made and saved."""
    base = model_directory()
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM", **request.param)
    model = get_peft_model(their_model(base), settings)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_our_adapter_in_peft(trained):
    """peft loads what finetune wrote, and gives our logits to the bit; the adapter changes them."""
    base, adapter = trained
    plain = their_logits(their_model(base))
    theirs = their_logits(PeftModel.from_pretrained(their_model(base), adapter))
    for ours in (
        smedjan.load(base, adapter=adapter, backend="torch_reference"),
        smedjan.load(adapter, backend="torch_reference"),
    ):
        np.testing.assert_array_equal(ours.logits(IDS), theirs.numpy())
    assert (theirs - plain).abs().max() > 1e-3


def test_an_adapter_away_from_its_base(model_directory, tmp_path, monkeypatch):
    """The base's path is relative to where it was trained: elsewhere the error is the adapter's, and says the way."""
    base, adapter = model_directory("base"), tmp_path / "adapter"
    get_peft_model(their_model(base), LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base"}))
    monkeypatch.chdir(tmp_path)
    here = smedjan.load(adapter, backend="torch_reference").logits(IDS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SmedjanError) as raised:
        smedjan.load("../adapter", backend="torch_reference")
    assert str(raised.value) == (
        "../adapter/adapter_config.json: base_model_name_or_path: names the base 'base', which is not in the working "
        "directory; give the path of the base model and --adapter ../adapter"
    )
    given = smedjan.load("../base", adapter="../adapter", backend="torch_reference")
    np.testing.assert_array_equal(given.logits(IDS), here)


def test_pefts_adapter_here(from_peft):
    base, adapter = from_peft
    theirs = their_logits(PeftModel.from_pretrained(their_model(base), adapter))
    ours = smedjan.load(base, adapter=adapter, backend="torch_reference").logits(IDS)
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("backend", ["cpu_native", "mlx_metal"])
def test_pefts_adapter_on_a_fast_backend(from_peft, backend):
    base, adapter = from_peft
    wide = PeftModel.from_pretrained(their_model(base), adapter)
    theirs, reference = their_logits(wide), their_logits(wide.double())
    ours = smedjan.load(base, adapter=adapter, backend=backend).logits(IDS)
    assert_close("logits", torch.from_numpy(ours), reference, theirs)


def test_merge_is_pefts(from_peft, tmp_path):
    """Each merged weight is as near to the float64 merge as peft's; all other weights are the base's, bit by bit."""
    base, adapter = from_peft
    report = smedjan.merge(base, adapter, tmp_path / "merged")
    plain = PeftModel.from_pretrained(their_model(base), adapter).merge_and_unload().state_dict()
    wide = PeftModel.from_pretrained(their_model(base), adapter).double().merge_and_unload().state_dict()
    before, merged = their_model(base).state_dict(), their_model(tmp_path / "merged").state_dict()
    assert set(merged) == set(plain)
    changed = 0
    for name, weight in merged.items():
        if any(target in name for target in TARGETS):
            assert_close(name, weight, wide[name], plain[name])
            assert not torch.equal(weight, before[name])
            changed += 1
        else:
            assert torch.equal(weight, before[name]), name
    assert changed == report.merged == 6
    largest = max(float((wide[name] - before[name]).abs().max()) for name in wide)
    assert report.largest_change == pytest.approx(largest, rel=1e-5)


def test_the_merged_model_loads_and_computes_the_same(trained, tmp_path):
    """transformers on the merged directory, against peft with the adapter beside the base; and ours on both."""
    base, adapter = trained
    smedjan.merge(base, adapter, tmp_path / "merged")
    model = PeftModel.from_pretrained(their_model(base), adapter)
    plain, reference = their_logits(model), their_logits(model.double())
    merged = their_logits(their_model(tmp_path / "merged"))
    assert_close("transformers", merged, reference, plain)
    ours = smedjan.load(tmp_path / "merged", backend="torch_reference").logits(IDS)
    np.testing.assert_array_equal(ours, merged.numpy())


def test_merge_rounds_once(from_peft, tmp_path):
    """To bfloat16: the float32 merge rounded, and not a product of rounded factors."""
    base, adapter = from_peft
    smedjan.merge(base, adapter, tmp_path / "wide")
    smedjan.merge(base, adapter, tmp_path / "narrow", dtype="bfloat16")
    wide = their_model(tmp_path / "wide").state_dict()
    for name, weight in their_model(tmp_path / "narrow", torch.bfloat16).state_dict().items():
        assert torch.equal(weight, wide[name].to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", "weight"), ("bias", "all"), ("rank_pattern", {"q_.*": 8}), ("alpha_pattern", {"q_proj": "8"})],
)
def test_what_is_not_plain_lora_is_refused(from_peft, key, value):
    base, adapter = from_peft
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(SmedjanError, match=key) as raised:
        smedjan.load(base, adapter=adapter, backend="torch_reference")
    assert "\n" not in str(raised.value)


def test_a_part_that_is_missing(from_peft, tmp_path):
    """Of DoRA its magnitudes too."""
    base, adapter = from_peft
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = list(tensors)[-1]
    del tensors[name]
    assert "lora_A" not in name
    save_file(tensors, file)
    for act in (
        lambda: smedjan.load(base, adapter=adapter, backend="torch_reference"),
        lambda: smedjan.merge(base, adapter, tmp_path / "merged"),
    ):
        with pytest.raises(SmedjanError, match=f"{re.escape(name)}: is missing"):
            act()
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model(from_peft, model_directory, tmp_path):
    _, adapter = from_peft
    other = model_directory("other", hidden_size=32)
    with pytest.raises(SmedjanError, match="shape") as raised:
        smedjan.load(other, adapter=adapter, backend="torch_reference")
    assert raised.value.remedy is not None
    with pytest.raises(SmedjanError):
        smedjan.merge(other, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_gpt2_whose_weights_are_transposed(tmp_path, dora):
    """[in, out] weights (peft's fan_in_fan_out): peft's adapter here, to the bit, and merged as peft merges it."""
    base, adapter = tmp_path / "gpt2", tmp_path / "adapter"
    make_model("gpt2", {**CASES["gpt2"]["plain"], "n_positions": 64}).save_pretrained(base)
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=dora)
    model = get_peft_model(their_model(base), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(adapter)
    ids = IDS % 97
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(their_model(base), adapter)(input_ids=torch.from_numpy(ids)).logits
    ours = smedjan.load(base, adapter=adapter, backend="torch_reference").logits(ids)
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert smedjan.merge(base, adapter, tmp_path / "merged").merged == 6
    plain = PeftModel.from_pretrained(their_model(base), adapter).merge_and_unload().state_dict()
    wide = PeftModel.from_pretrained(their_model(base), adapter).double().merge_and_unload().state_dict()
    for name, weight in their_model(tmp_path / "merged").state_dict().items():
        assert_close(name, weight, wide[name].double(), plain[name])
