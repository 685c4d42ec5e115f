"""Rows to evaluate on: types by their keys, answers by index, letter or text, one line for what is wrong."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smedjan.data.formats import Row, Source
from smedjan.errors import DataError
from smedjan.evaluate.rows import Choice, Question, asked, eval_row, read_eval_rows

HERE = Source(file="rows.jsonl", line=3)


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["red", "blue"], 1, 1),
        (["red", "blue"], "B", 1),
        (["red", "blue"], " a", 0),
        (["red", "blue"], "blue", 1),
        ([" red", " blue"], "blue", 1),
        (["red", "blue"], "1", 1),
        (["B", "A"], "A", 1),  # what a choice says goes before its place
        (["10", "1"], "1", 1),
        ('["red", "blue"]', "1", 1),  # of a CSV
    ],
)
def test_an_answer_is_an_index_a_letter_or_a_text(choices, answer, index):
    row = eval_row({"prompt": "?", "choices": choices, "answer": answer}, HERE)
    assert isinstance(row, Choice)
    assert row.answer == index


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a", "b"], "answer": 2}, "`answer` is 2, which is none of the 2 choices"),
        ({"choices": ["a", "b"], "answer": True}, "`answer` is True"),
        ({"choices": ["red", "blue"], "answer": "C"}, "its letter (A to B)"),
        ({"choices": ["a", "b"], "answer": -1}, "`answer` is -1"),
        ({"choices": ["a"], "answer": 0}, "has fewer than 2 `choices`"),
        ({"choices": ["a", ""], "answer": 0}, "no list of strings that say something"),
        ({"choices": "red", "answer": 0}, "`choices` is no list"),
        ({"choices": ["a", "b"]}, "lacks `answer`"),
        ({"answer": ["x", 4]}, "`answer` is no string and no list of strings"),
        ({"answers": []}, "`answers` is no string"),
        ({"prompt": "", "answer": "x"}, "`prompt` is empty"),
        ({"prompt": [{"content": "hi"}], "answer": "x"}, "`prompt[0]` lacks `role`"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(record, message):
    with pytest.raises(DataError) as caught:
        eval_row({"prompt": "?", **record}, HERE)
    assert message in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl: line 3: ")


def test_types_by_their_keys():
    chat = [{"role": "user", "content": "hi"}]
    reply = {"role": "assistant", "content": "yo"}
    question = eval_row({"prompt": chat, "answers": ["yo", "hey"]}, HERE)
    assert isinstance(question, Question)
    assert asked(question) == ((chat[0],), ("yo", "hey"))
    row = eval_row({"prompt": "p", "completion": "c", "answer": "ignored"}, HERE)
    assert isinstance(row, Row)
    assert asked(row) == ("p", ("c",))
    assert asked(eval_row({"messages": [*chat, reply]}, HERE)) == ((chat[0],), ("yo",))
    assert asked(eval_row({"messages": chat}, HERE)) is None
    assert asked(eval_row({"text": "t"}, HERE)) is None


def test_rows_of_one_type_from_any_file(tmp_path):
    records = [{"prompt": f"{n}?", "choices": ["yes", "no"], "answer": n % 2, "id": n} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "test.parquet")
    rows = read_eval_rows(tmp_path, limit=3)
    assert [row.answer for row in rows] == [0, 1, 0]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [records[0], {"prompt": "p", "answer": "a"}]))
    with pytest.raises(DataError, match=r"line 2: a row of type prompt\+answer, but .* is prompt\+choices\+answer"):
        read_eval_rows(mixed)
