"""A run and its data: what is said of them, kept of them, and refused when they change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import smedjan
from smedjan.data import cache
from smedjan.errors import CheckpointError
from smedjan.train.config import FinetuneConfig
from smedjan.train.finetune import finetune

Configure = Callable[..., FinetuneConfig]
Write = Callable[..., Path]


def test_converted_rows_train_as_the_rows_that_they_become(configure: Configure, write_rows: Write) -> None:
    """Alpaca's on a model with a chat template: the very weights of the conversations, and the run says so."""
    answers = [f"world {n % 3}" for n in range(8)]
    alpaca = write_rows(
        [{"instruction": f"hello {n}", "input": "", "output": a} for n, a in enumerate(answers)], "a.jsonl"
    )
    chats = write_rows(
        [
            {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": a}]}
            for n, a in enumerate(answers)
        ],
        "b.jsonl",
    )
    said: list[str] = []
    made = finetune(configure("alpaca", data=str(alpaca), train__steps=2), say=said.append)
    assert made.converted == {"from": "Alpaca", "to": "messages"}
    assert said == [
        f"{alpaca}: Alpaca rows are read as messages: instruction and input are the user's, output the answer"
    ]
    plain = finetune(configure("chats", data=str(chats), train__steps=2), say=said.append)
    assert (plain.converted, len(said)) == (None, 1)
    assert made.weights_sha256 == plain.weights_sha256


def test_a_run_from_the_cache_is_the_same_run(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hashes = set()
    for number, where in enumerate(("off", str(tmp_path / "cache"), str(tmp_path / "cache"))):
        monkeypatch.setenv("SMEDJAN_CACHE", where)
        if number == 2:
            # From the cache, or not at all
            monkeypatch.setattr(cache, "stream_rows", None)
        hashes.add(finetune(configure(f"run{number}", train__steps=3)).weights_sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize("change", ["a row more", "an answer", "the order"])
def test_a_data_file_that_changes_under_a_run(configure: Configure, pairs: Path, change: str) -> None:
    """A cursor into other data means nothing: --resume names the file and trains no step."""
    config = configure(train__steps=2)
    smedjan.finetune(config)
    lines = pairs.read_text().splitlines()
    changed = {
        "a row more": [*lines, json.dumps({"prompt": "hello ", "completion": "world"})],
        "an answer": [lines[0].replace("world 0", "world 1"), *lines[1:]],
        "the order": [lines[1], lines[0], *lines[2:]],
    }[change]
    assert changed != lines
    pairs.write_text("\n".join(changed))
    seen: list = []
    with pytest.raises(CheckpointError, match=r"the rows are not those that the run in .* was started with") as caught:
        smedjan.finetune(replace(config, resume=True), on_step=seen.append)
    assert (caught.value.file, caught.value.field) == (str(pairs), "data")
    assert "bring back the file as it was" in str(caught.value.remedy)
    assert seen == []
    pairs.write_text("\n".join(lines))
    smedjan.finetune(replace(config, resume=True))


def test_rows_of_equal_tokens_are_the_same_data(configure: Configure, pairs: Path) -> None:
    """Blank lines, columns that are not read and another file name change nothing."""
    config = configure(train__steps=2)
    smedjan.finetune(config)
    rows = [json.loads(line) | {"id": n} for n, line in enumerate(pairs.read_text().splitlines())]
    moved = pairs.with_name("moved.json")
    moved.write_text(json.dumps(rows))
    smedjan.finetune(replace(config, resume=True, data=moved))
