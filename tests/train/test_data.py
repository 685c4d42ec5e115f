"""A run and its data: what is said of them, kept of them, and refused when they change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import smedjan
from smedjan.cli import app
from smedjan.data import cache
from smedjan.errors import CheckpointError, DataError
from smedjan.train.config import FinetuneConfig
from smedjan.train.finetune import finetune
from smedjan.train.header import lines

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


def test_broken_rows_are_left_out_when_asked(configure: Configure, tmp_path: Path, capsys) -> None:
    """By default the first ends the run, with nothing written; left out, the run is that of the file without them, and
    the line before it, its header, its result and its plan say so."""
    good = [f"hello {n},world {n % 3}" for n in range(12)]
    broken, without = tmp_path / "broken.csv", tmp_path / "without.csv"
    broken.write_text("\n".join(["prompt,completion", *good[:5], "hello, you,world", *good[5:], "alone"]) + "\n")
    without.write_text("\n".join(["prompt,completion", *good]) + "\n")
    config = configure("broken", data=str(broken), train__steps=3, train__sample_every=3, train__sample_prompts="hello")
    with pytest.raises(DataError) as caught:
        finetune(config)
    assert str(caught.value) == (
        f"{broken}: line 7: 3 fields for 2 columns (prompt, completion): none for 'world'; "
        "quote fields that hold commas; --train.broken drop leaves broken rows out"
    )
    assert not config.out.exists()
    said: list[str] = []
    seen: list[dict] = []
    config = replace(config, train=replace(config.train, broken="drop"))
    made = finetune(config, on_step=seen.append, say=said.append)
    told = (
        "2 broken rows are left out; the first: line 7: 3 fields for 2 columns (prompt, completion): none for 'world'"
    )
    assert said == [f"{broken}: {told}"]
    assert made.rows == {"kept": 12, "truncated": 0, "dropped": 0, "broken": 2}
    assert dict(lines(seen[0]["header"]))["rows"].startswith("12 kept, 2 broken; ")
    plain = finetune(configure("without", data=str(without), train__steps=3))
    assert made.weights_sha256 == plain.weights_sha256
    assert plain.rows["broken"] == 0
    words = ["finetune", "--dry-run", "--model", config.model, "--data", str(broken), "--train.steps", "3"]
    assert app.run([*words, "--train.broken", "drop", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"] == made.rows
    assert printed.err == f"{broken}: {told}\n"
    for unplanned in (words, [*words[:1], *words[2:], "--out", str(tmp_path / "never")]):
        assert app.run(unplanned) == 2
        assert capsys.readouterr().err == f"smedjan: {caught.value}\n", "one line, and no empty one above"
    assert not (tmp_path / "never").exists()


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
