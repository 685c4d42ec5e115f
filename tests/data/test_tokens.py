"""Tokens give back the examples they were made of, by value, in memory as from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smedjan.data.example import Example
from smedjan.data.files import Source
from smedjan.data.tokens import Tokens, TokenWriter

DOCUMENTS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.booleans()), min_size=1, max_size=9),
        st.sampled_from(["a.jsonl", "b.csv"]),
        st.integers(1, 2**40),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def examples_of(documents: list) -> list[Example]:
    return [
        Example(
            input_ids=np.array([token for token, _ in pairs], np.int32),
            labels_mask=np.array([mark for _, mark in pairs], bool),
            source=Source(file=Path(name), line=line, unit="line" if name == "a.jsonl" else "row"),
            truncated=truncated,
        )
        for pairs, name, line, truncated in documents
    ]


def same(one: Example, other: Example) -> bool:
    return (
        np.array_equal(one.input_ids, other.input_ids)
        and np.array_equal(one.labels_mask, other.labels_mask)
        and one.input_ids.dtype == other.input_ids.dtype
        and (one.source, one.truncated) == (other.source, other.truncated)
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(DOCUMENTS)
def test_every_example_comes_back(documents: list) -> None:
    examples = examples_of(documents)
    tokens = Tokens.of(examples)
    assert len(tokens) == len(examples)
    assert all(same(one, other) for one, other in zip(tokens, examples, strict=True))
    assert same(tokens[-1], examples[-1])
    assert [same(one, other) for one, other in zip(tokens[::-2], examples[::-2], strict=True)]
    assert tokens.lengths.tolist() == list(map(len, examples))
    assert tokens.trained_tokens == sum(example.trained_tokens for example in examples)
    for index in (len(examples), -len(examples) - 1):
        with pytest.raises(IndexError):
            tokens[index]


def test_files_hold_the_same(tmp_path: Path) -> None:
    examples = examples_of([([(7, True), (8, False)], "a.jsonl", 3, True), ([(9, True)], "b.csv", 1, False)] * 50)
    opened = {}

    def create(name: str):
        opened[name] = (tmp_path / name).open("w+b")
        return opened[name]

    writer = TokenWriter(create)
    for example in examples:
        writer.append(example)
    tokens = writer.tokens()
    for file in opened.values():
        file.close()
    assert all(same(one, other) for one, other in zip(tokens, examples, strict=True))
    assert tokens.sha256 == Tokens.of(examples).sha256
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {
        name: len(tokens.tensors[name].data) for name in opened
    }
