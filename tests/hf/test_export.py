"""What save_model writes is whole, loads in transformers, and can be written over a run directory."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.safetensors import open_checkpoint
from smedjan.errors import CheckpointError
from smedjan.hf.export import save_model

Make = Callable[..., Any]


def raw(tensor: torch.Tensor) -> RawTensor:
    data = memoryview(bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return RawTensor(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), data=data)


def read(source: Path) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    return json.loads((source / "config.json").read_text()), dict(open_checkpoint(source))


@pytest.mark.parametrize("shard", [10_000_000, 50_000])
def test_a_trained_model_loads_in_transformers(shard: int, model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    config, _ = read(source)
    model = AutoModelForCausalLM.from_pretrained(source).to(torch.bfloat16)
    tensors = {name: raw(parameter) for name, parameter in model.named_parameters()}
    save_model(tmp_path / "out", config, tensors, source, max_shard_bytes=shard)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(left, right) for left, right in zip(again.parameters(), model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard < 100_000)


def test_a_run_directory_keeps_what_it_holds(model_directory: Make, tmp_path: Path) -> None:
    """Into a run: checkpoints stay, a larger model's shards go, and the tokenizer may already be there."""
    source, run = model_directory(), tmp_path / "run"
    config, tensors = read(source)
    (run / "smedjan").mkdir(parents=True)
    (run / "smedjan" / "latest.json").write_text("{}")
    save_model(run, config, tensors, source, into_run=True, max_shard_bytes=50_000)
    save_model(run, config, tensors, run, into_run=True, extra_files={"NOTICE": b"made here"})
    assert (run / "smedjan" / "latest.json").read_text() == "{}"
    assert len(list(run.glob("*.safetensors*"))) == 1
    assert (run / "NOTICE").read_bytes() == b"made here"
    assert AutoModelForCausalLM.from_pretrained(run).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(run).eos_token == "<|end|>"


def test_a_model_is_never_without_its_weights(
    model_directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json, by which a directory is known, is written last and removed first."""
    source, run = model_directory(), tmp_path / "run"
    config, tensors = read(source)
    save_model(run, config, tensors, source, into_run=True)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        save_model(run, config, tensors, source, into_run=True)
    assert not (run / "config.json").exists()
    with pytest.raises(CheckpointError, match="the disk is full"):
        save_model(tmp_path / "new", config, tensors, source)
    assert not (tmp_path / "new").exists()


def test_an_existing_directory_is_refused(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    config, tensors = read(source)
    with pytest.raises(CheckpointError, match="not empty"):
        save_model(source, config, tensors, source)
    assert AutoModelForCausalLM.from_pretrained(source).num_parameters() > 0


def test_tensors_that_are_not_the_model_s_are_a_defect_of_ours(model_directory: Make, tmp_path: Path) -> None:
    source = model_directory()
    config, tensors = read(source)
    tensors.pop("model.norm.weight")
    with pytest.raises(AssertionError, match="not the model's parameters"):
        save_model(tmp_path / "out", config, tensors, source)
    assert not (tmp_path / "out").exists()
