"""The demo's way through the API, from model directory to report, on a Llama of a few thousand parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import demo
import pytest
import task
import tokenizers
import torch
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_task() -> task.Task:
    """Twelve words and the name of one of two licences, over and over."""

    def notices(start: int, count: int) -> list[task.Notice]:
        return [
            task.Notice(
                rule=f"{i}.RULE",
                text=f"file {i} may be copied by you and me under the {('MIT', 'ISC')[i % 2]} terms",
                spdx=("MIT", "ISC")[i % 2],
            )
            for i in range(start, start + count)
        ]

    return task.Task(train=notices(0, 48), valid=notices(48, 8), test=notices(56, 12), statistics={})


def save_tiny_model(base: Path) -> None:
    """In place of the import of a GGUF file, which tests/hf covers."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    LlamaForCausalLM(settings).save_pretrained(base)
    byte_level = tokenizers.Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    byte_level.train_from_iterator([notice.row()["prompt"] for notice in tiny_task().train], trainer)
    PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<|end|>").save_pretrained(base)


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "import_base", lambda base: None if base.exists() else save_tiny_model(base))
    monkeypatch.setattr(task, "build", tiny_task)
    monkeypatch.setattr(task, "TRAIN", 48)
    monkeypatch.setattr(demo, "LAST_LAYERS", 1)
    monkeypatch.setattr(demo, "console", Console(record=True, width=200))
    out = tmp_path / "out"

    demo.demo(out, "Any notice <b>at all</b> [bold]of mine[/bold]")

    said = demo.console.export_text()
    assert "[bold]of mine[/bold]" in said, "a notice is shown as typed"
    assert re.search(r"SPDX: .*", said.splitlines()[-2])
    inside = out / "run" / "smedjan"
    parity = json.loads((inside / "parity.json").read_text())
    assert parity["cases"]
    assert all(case["equal"] for case in parity["cases"])
    evaluation = json.loads((inside / "eval.json").read_text())
    right = [sample["answer"] == sample["expected"] for sample in evaluation["samples"]]
    assert evaluation["n"] == len(right) == 12
    assert evaluation["exact_match"] == pytest.approx(sum(right) / 12)
    assert len(json.loads((inside / "bench.json").read_text())["rounds"]) == 3
    events = [json.loads(line) for line in (inside / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    assert max(row["step"] for row in steps) == steps[0]["total_steps"] > 1
    html = (out / "report.html").read_text(encoding="utf-8")
    for said_there in ("Licence notice to SPDX identifier", "CC-BY-4.0", "Q4_1", "tf-idf + logistic regression, tuned"):
        assert said_there in html

    # Run again it trains nothing, and says the same of the same weights.
    before = json.loads((inside / "run.json").read_text())["weights_sha256"]
    demo.demo(out, "again")
    assert json.loads((inside / "run.json").read_text())["weights_sha256"] == before
    assert json.loads((inside / "eval.json").read_text()) == evaluation
