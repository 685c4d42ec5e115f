"""The cache of tokens: what decides its key, that it gives what tokenizing gives, that damage is seen, and that neither
it nor the run that reads it holds the data in memory."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smedjan.data import cache
from smedjan.data.cache import SUFFIX, UNUSED_SECONDS, dates, tokenize_file
from smedjan.data.dataset import TokenDataset
from smedjan.data.formats import read_rows
from smedjan.data.mask import Tokenized, tokenize_rows
from smedjan.errors import DataError

NOW = datetime(2026, 3, 1, 12, 30)
Run = Callable[..., Tokenized]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, empty."""
    monkeypatch.setenv("SMEDJAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "the answer " * (1 + n % 5)}) + "\n" for n in range(20)))
    return path


@pytest.fixture
def run(plain: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """tokenize_file; `.tokenized` counts how often rows were tokenized."""

    def count(*args: Any, **options: Any) -> Tokenized:
        call.tokenized += 1
        return tokenize_rows(*args, **options)

    monkeypatch.setattr(cache, "tokenize_rows", count)

    def call(path: Path = data, tokenizer: Any = plain, **options: Any) -> Tokenized:
        return tokenize_file(path, "train", tokenizer, **{"max_length": 64, "now": NOW, **options})

    call.tokenized = 0  # type: ignore[attr-defined]
    return call


def content(made: Tokenized) -> tuple:
    rows = [(e.input_ids.tolist(), e.labels_mask.tolist(), e.source.field, e.truncated) for e in made.examples]
    return rows, made.counts, made.converted, str(made.first_broken)


def test_a_second_run_tokenizes_nothing_and_is_given_the_same(kept: Path, run: Any, data: Path, plain: Any) -> None:
    first, second = run(), run()
    assert run.tokenized == 1
    assert content(first) == content(second) == content(tokenize_rows(read_rows(data), plain, max_length=64))
    assert [file.suffix for file in kept.iterdir()] == [SUFFIX]
    moved = data.rename(data.with_name("moved.jsonl"))
    assert {example.source.file for example in run(moved).examples} == {moved}
    assert run.tokenized == 1, "the path decides nothing"


def test_what_was_left_out_is_kept_too(kept: Path, run: Any, data: Path) -> None:
    with data.open("a") as rows:
        rows.write('{"text": 7}\n{"text": "whole"}\n')
    with pytest.raises(DataError, match=r"line 21: `text` is a number.*--train.broken drop leaves broken rows out"):
        run()
    first, second = run(broken="drop"), run(broken="drop")
    assert run.tokenized == 2, "the second was read"
    assert (first.counts.kept, first.counts.broken) == (21, 1)
    assert content(first) == content(second)
    moved = data.rename(data.with_name("moved.jsonl"))
    assert str(run(moved, broken="drop").first_broken).startswith(f"{moved}: line 21: `text` is a number")


def test_what_decides_tokens_decides_the_key(kept: Path, run: Any, data: Path, plain: Any, with_bos: Any) -> None:
    run()
    runs: list[Any] = [
        lambda: run(max_length=63),
        lambda: run(too_long="drop"),
        lambda: run(broken="drop"),
        lambda: run(loss_on="all"),
        lambda: run(tokenizer=with_bos),
        lambda: run(tokenizer=replace(plain, eos_token="<|endoftext|>")),
        lambda: run(tokenizer=replace(plain, chat_template=None)),
    ]
    for number, other in enumerate(runs, start=2):
        other()
        assert run.tokenized == number
    data.write_text(data.read_text().replace("answer", "answeR", 1))
    run()
    assert run.tokenized == len(runs) + 2
    run()
    assert run.tokenized == len(runs) + 2


def test_the_date_decides_where_the_template_prints_it(templates: dict[str, str]) -> None:
    day, minute = NOW.replace(day=2), NOW.replace(minute=31)
    assert dates(templates["smollm2"], NOW) == dates(templates["smollm2"], day) == []
    assert dates(templates["llama3"], NOW) == dates(templates["llama3"], minute) == ["01 Mar 2026"]
    assert dates(templates["llama3"], NOW) != dates(templates["llama3"], day)
    for unclear in ("{{ strftime_now(form) }}", "{% set f = strftime_now %}{{ f('%d') }}", "{{ strftime_now ('%M') }}"):
        assert dates(unclear, NOW) != dates(unclear, minute), unclear
    assert dates("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}", NOW) == ["2026"]


def test_any_damaged_byte_is_seen_and_said(kept: Path, run: Any) -> None:
    """Header, metadata, every array, and a file that was cut: rows are tokenized anew, which is said."""
    whole = content(run())
    (file,) = kept.iterdir()
    good = file.read_bytes()
    places = [*range(0, 16), *np.random.default_rng(0).integers(0, len(good), 40).tolist(), len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1
        file.write_bytes(bad)
        before, said = run.tokenized, []
        assert content(run(say=said.append)) == whole
        assert run.tokenized == before + 1, f"byte {place}"
        assert len(said) == 1
        assert said[0].startswith(f"{file}: ")
        assert said[0].endswith("; the rows are tokenized anew")
        assert file.read_bytes() == good
    for bad in (good[:-1], good[: len(good) // 2], b"", good + b"x"):
        file.write_bytes(bad)
        said = []
        assert content(run(say=said.append)) == whole
        assert len(said) == 1


def test_off_and_not_writable(kept: Path, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = content(run())
    monkeypatch.setenv("SMEDJAN_CACHE", "off")
    assert content(run()) == whole
    assert run.tokenized == 2
    monkeypatch.setenv("SMEDJAN_CACHE", str(tmp_path / "other"))

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(cache, "TemporaryFile", refuse)
        assert content(run(say=said.append)) == whole
    assert len(said) == 1
    assert "cannot be written, so tokens stay in memory" in said[0]

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"No space left on device; free some space, or set SMEDJAN_CACHE"):
        run()
    assert not any((tmp_path / "other" / "tokens").iterdir())


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SMEDJAN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.folder() == tmp_path / ".cache" / "smedjan" / "tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "smedjan" / "tokens"


def test_an_error_leaves_nothing(kept: Path, run: Any, data: Path) -> None:
    data.write_text('{"text": "good"}\n{"text": ""}\n')
    with pytest.raises(DataError, match="line 2: `text` is empty"):
        run()
    assert list(kept.iterdir()) == []


def test_a_file_that_changes_while_it_is_read(
    kept: Path, run: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens would be kept under the key of what it was before."""
    tokenize = cache.tokenize_rows

    def late(*args: Any, **options: Any) -> Tokenized:
        made = tokenize(*args, **options)
        with data.open("a") as file:
            file.write('{"text": "late"}\n')
        return made

    monkeypatch.setattr(cache, "tokenize_rows", late)
    with pytest.raises(DataError, match=r"rows.jsonl: was changed while it was read"):
        run()
    assert list(kept.iterdir()) == []


def test_what_no_run_reads_goes(kept: Path, run: Any) -> None:
    run()
    (old,) = kept.iterdir()
    past = time.time() - UNUSED_SECONDS - 60
    os.utime(old, (past, past))
    run()
    assert run.tokenized == 1, "read, so not unused"
    os.utime(old, (past, past))
    run(max_length=63)
    (new,) = kept.iterdir()
    assert new != old


class Bytes:
    """A token a byte; as little else as possible, to see what is held."""

    bos_token_id = bos_token = chat_template = None
    eos_token_id, eos_token, eos_token_ids = 0, "\0", (0,)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def fingerprint(self) -> str:
        return "bytes"


@pytest.mark.parametrize("packing", [False, True])
def test_memory_does_not_grow_with_the_data(kept: Path, tmp_path: Path, packing: bool) -> None:
    """8 MB of rows, 40 MB of arrays: making, reading and training on them takes a quarter of the rows' size."""
    path, length, rows = tmp_path / "large.jsonl", 4000, 2000
    with path.open("w") as file:
        file.writelines(json.dumps({"text": chr(97 + n % 26) * length}) + "\n" for n in range(rows))
    tracemalloc.start()
    try:
        for _ in ("made", "read"):
            made = tokenize_file(path, "train", Bytes(), max_length=2 * length + 2, now=NOW)  # type: ignore[arg-type]
            dataset = TokenDataset(made.examples)
            steps = dataset.steps(seed=0, batch_size=2, epochs=0.1, packing=packing, max_length=2 * length + 2)
            seen = sum(batch.tokens for step in range(len(steps)) for batch in steps.batches_for_step(step))
            assert seen >= 0.1 * rows * length
            dataset.fingerprint()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert dataset.tokens == rows * (length + 1)
    assert peak < rows * length / 4
