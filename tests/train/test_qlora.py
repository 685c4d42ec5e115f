"""QLoRA runs: to the bit those of LoRA on the dequantised weights, resumed ones too; adapters are ordinary."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import smedjan
from smedjan.backends.torch_reference import backend
from smedjan.checkpoint import stored
from smedjan.hf.load import open_model

QLORA = {"method": "qlora", "lora__rank": 4, "train__steps": 3}


@pytest.fixture
def dequantised(tiny, tmp_path):
    """The tiny model in `dtype`, its blocks' linear weights replaced by what 4 or 8 bits leave of them."""

    def make(dtype: str, bits: int = 4):
        storage = {4: "nf4", 8: "int8"}[bits]
        directory = tmp_path / f"dequantised-{dtype}"
        shutil.copytree(tiny, directory)
        tensors = load_file(directory / "model.safetensors")
        narrow = open_model(tiny).config.linear_weights()
        arrays = backend()
        for name, tensor in tensors.items():
            raw = arrays.to_raw(tensor.to(getattr(torch, dtype)))
            if name in narrow:
                raw = stored.dequantize(storage, stored.quantize(storage, raw), raw.shape, raw.dtype)
            tensors[name] = arrays.from_raw(raw)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return make


@pytest.mark.parametrize(
    ("on", "dtype", "bits"),
    [
        *((on, dtype, 4) for on in ("torch_reference", "cpu_native") for dtype in ("float32", "bfloat16")),
        ("torch_reference", "float32", 8),
        ("cpu_native", "bfloat16", 8),
    ],
)
def test_a_run_is_lora_on_the_dequantised_weights(configure, dequantised, read_log, dtype, on, bits):
    flags = {**QLORA, "dtype": dtype, "backend": on, "lora__dropout": 0.1}
    ours = smedjan.finetune(configure("ours", **flags, lora__bits=bits))
    theirs = smedjan.finetune(
        configure("theirs", **{**flags, "method": "lora", "model": str(dequantised(dtype, bits))})
    )
    losses = [[(step["loss"], step["grad_norm"]) for step in read_log(run.run_dir).steps] for run in (ours, theirs)]
    assert losses[0][0][1] > 0
    if on == "torch_reference":
        assert ours.weights_sha256 == theirs.weights_sha256
        assert losses[0] == losses[1]
    else:  # products of stacked weights sum in another order
        near = 1e-5 if dtype == "float32" else 2**-8
        assert losses[0] == [pytest.approx(step, rel=near) for step in losses[1]]


def test_triton_runs_it(configure, read_log):
    """Kernels interpreted: the losses of the exact backend, but for the order of sums."""
    flags = {**QLORA, "train__steps": 2, "train__batch_size": 1, "lora__targets": "q_proj,down_proj"}
    exact = smedjan.finetune(configure("exact", **flags))
    run = smedjan.finetune(configure("triton", **flags, backend="cuda_triton"))
    plan = json.loads((run.run_dir / "smedjan" / "plan.json").read_text())
    assert {row["lowering"] for row in plan["ops"] if row["op"] == "nf4_dequantize"} == {"triton nf4_dequantize"}
    for ours, theirs in zip(read_log(run.run_dir).steps, read_log(exact.run_dir).steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_lora_on_the_weights_as_they_are_is_another_run(configure):
    """The equality above means something."""
    others = {"lora": {"method": "lora"}, "qlora": {}, "8 bits": {"lora__bits": 8}}
    runs = [smedjan.finetune(configure(name, **{**QLORA, **flags})) for name, flags in others.items()]
    assert len({run.weights_sha256 for run in runs}) == 3


@pytest.mark.parametrize("on", ["torch_reference", "cpu_native"])
def test_a_resumed_run_makes_the_same_bits(configure, on):
    flags = {**QLORA, "train__steps": 4, "train__save_every": 1, "backend": on, "train__packing": True}
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


def test_the_method_decides_what_may_be_resumed(configure):
    config = configure(**QLORA)
    smedjan.finetune(config)
    assert config.config_hash() != replace(config, lora=replace(config.lora, bits=8)).config_hash()
    assert config.config_hash() == replace(config, lora=replace(config.lora, bits=None)).config_hash(), "4 by default"
    assert config.config_hash() != replace(config, lora=replace(config.lora, rank=8)).config_hash()
    with pytest.raises(
        smedjan.errors.ConfigError, match="method: is lora, and the run was started with another, qlora"
    ):
        smedjan.finetune(replace(config, method="lora", lora=replace(config.lora, bits=None), resume=True))


def test_the_adapter_is_an_ordinary_one(configure, tiny, tmp_path):
    """Loaded, generated from and merged with the model as it is stored."""
    run = smedjan.finetune(configure(**QLORA, eval_data=str(configure().data)))
    assert run.eval_loss is not None
    assert json.loads((run.run_dir / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = smedjan.load(run.run_dir, backend="torch_reference")
    assert loaded.session.quantized == ()
    ids = [[5, 9, 30, 31]]
    assert not np.array_equal(loaded.logits(ids), smedjan.load(tiny, backend="torch_reference").logits(ids))
    assert len(list(loaded.generate(ids[0], max_new_tokens=3, stop=()))) == 3
    report = smedjan.merge(tiny, run.run_dir, tmp_path / "merged")
    assert report.merged == 14


def test_the_plan_counts_four_bits(configure):
    """A dry run's memory is that of what is stored, and its ops name the dequantisation."""
    configs = {method: configure(**{**QLORA, "method": method}, dry_run=True) for method in ("lora", "qlora")}
    plans = {method: smedjan.plan(config) for method, config in configs.items()}
    assert plans["qlora"].parameters == plans["lora"].parameters
    assert plans["qlora"].trained_parameters == plans["lora"].trained_parameters
    assert "nf4_dequantize" in {row["op"] for row in plans["qlora"].ops}
    assert "nf4_dequantize" not in {row["op"] for row in plans["lora"].ops}
