"""ShareGPT and Alpaca: what becomes of each part, what the reader is told, and one line for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from smedjan.data.formats import Row, Source, conversion, read_rows, row_of
from smedjan.errors import DataError


def row(chat: bool = True, **record: Any) -> Row:
    return row_of(record, Source(file=Path("a.jsonl"), line=7), chat=chat)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SHAREGPT = {
    "id": "x1",
    "system": "Be brief.",
    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
}


def test_sharegpt_becomes_messages() -> None:
    made = row(**SHAREGPT)
    assert (made.kind, made.messages) == (
        "messages",
        ({"role": "system", "content": "Be brief."}, user("hi"), answer("hello")),
    )
    assert made.converted == {"from": "ShareGPT", "to": "messages"}
    assert conversion(made.converted) == "ShareGPT rows are read as messages: human is the user, gpt the assistant"


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("human", "user", "input"), "user"),
        (("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
        (("tool", "observation", "function_response"), "tool"),
        (("system",), "system"),
    ],
)
def test_roles_of_sharegpt(names: tuple[str, ...], role: str) -> None:
    for name in names:
        made = row(conversations=[{"from": name, "value": "x"}])
        assert made.messages == ({"role": role, "content": "x"},)


def test_calls_and_tools_of_sharegpt() -> None:
    """As LLaMA-Factory has them: `tools` is JSON in a string, and so is a call."""
    tools = [{"name": "sum", "parameters": {}}]
    made = row(
        tools=json.dumps(tools),
        conversations=[
            {"from": "human", "value": "1 + 1"},
            {"from": "function_call", "value": '{"name": "sum", "arguments": {"of": [1, 1]}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "two"},
        ],
    )
    assert made.tools == tuple(tools)
    function = {"name": "sum", "arguments": {"of": [1, 1]}}
    assert made.messages[1] == {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    assert made.messages[2:] == ({"role": "tool", "content": "2"}, answer("two"))


def test_conversations_of_role_and_content_are_only_renamed() -> None:
    made = row(conversations=[user("hi"), answer("hello")])
    assert made.messages == (user("hi"), answer("hello"))


BELOW = "Below is an instruction that describes a task"
PAIRED = ", paired with an input that provides further context"
WRITE = ". Write a response that appropriately completes the request.\n\n"


def test_alpaca_is_stanford_s_prompt_where_the_model_has_no_template() -> None:
    made = row(chat=False, instruction="Add.", input="1, 2", output="3", text="as printed")
    prompt = f"{BELOW}{PAIRED}{WRITE}### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    assert (made.kind, made.prompt, made.completion) == ("prompt+completion", prompt, "3")
    assert made.converted == {"from": "Alpaca", "to": "prompt+completion"}
    assert "Stanford Alpaca's prompt text" in str(conversion(made.converted))
    for nothing in ({}, {"input": ""}, {"input": None}):
        made = row(chat=False, instruction="Say {input}.", output="3", **nothing)
        assert made.prompt == f"{BELOW}{WRITE}### Instruction:\nSay {{input}}.\n\n### Response:\n"


def test_alpaca_is_a_conversation_where_the_model_has_one() -> None:
    made = row(instruction="Add.", input="1, 2", output="3", history=[["q", "a"]], system="Be brief.")
    assert made.kind == "messages"
    assert made.messages == (
        {"role": "system", "content": "Be brief."},
        *(user("q"), answer("a"), user("Add.\n1, 2"), answer("3")),
    )
    assert row(instruction="Add.", input="", output="3").messages == (user("Add."), answer("3"))
    with pytest.raises(DataError, match="line 7: has a `history`, and the model has no chat template"):
        row(chat=False, instruction="Add.", output="3", history=[["q", "a"]])


def test_a_row_type_goes_before_a_conversion() -> None:
    """But `text` beside Alpaca's columns is tatsu-lab's, in which the answer is not told from the prompt."""
    both = row(messages=[user("hi"), answer("a")], conversations=[{"from": "human", "value": "other"}])
    assert (both.messages[0]["content"], both.origin) == ("hi", None)
    assert row(prompt="p", completion="c", instruction="i", output="o").origin is None
    assert row(text="t", instruction="i", output="o").origin == "Alpaca"
    assert row(text="t", instruction="i").origin is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": "hi"}, "`conversations` is not a list"),
        ({"conversations": []}, "`messages` is empty"),
        ({"conversations": ["hi"]}, "is a string, not a message"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            r"`conversations\[0\].from` is 'narrator', not one of",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"from` is \['gpt'\], not one of"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "lacks `value`"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "is empty"),
        ({"conversations": [{"from": "function_call", "value": "sum(1)"}]}, "is no function call"),
        ({"conversations": [{"from": "function_call", "value": "[" * 10**5}]}, "is no function call"),
        ({"conversations": [{"from": "human", "value": "x"}], "tools": "{"}, "`tools` is not JSON"),
        ({"instruction": "i", "output": ""}, "`output` is empty"),
        ({"instruction": 3, "output": "o"}, "`instruction` is not a string"),
        ({"instruction": "i", "input": ["x"], "output": "o"}, "`input` is not a string"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "`history` is not a list"),
    ],
)
def test_what_cannot_be_read(record: dict[str, Any], message: str) -> None:
    for chat in (True, False):
        with pytest.raises(DataError, match=message) as caught:
            row(chat=chat, **record)
        assert str(caught.value).startswith("a.jsonl: line 7: ")
        assert caught.value.remedy


def test_a_file_is_of_one_origin(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in (SHAREGPT, {"messages": [user("a"), answer("b")]})))
    with pytest.raises(DataError, match=r"line 2: a row of type messages, but .*line 1 is ShareGPT \(as messages\)"):
        read_rows(path)


def test_from_a_table(tmp_path: Path) -> None:
    """Arrow gives every turn every key: those of others are null, and columns that nobody knows are not decoded."""
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello", "weight": 1}]
    rows = [{"conversations": turns, "source": "web"}, {"conversations": turns[:1], "source": "web"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [made.messages for made in read_rows(tmp_path / "a.parquet")] == [
        (user("hi"), answer("hello")),
        (user("hi"),),
    ]
    alpaca = [{"instruction": "i", "input": "", "output": "o", "score": 3}]
    parquet.write_table(pyarrow.Table.from_pylist(alpaca), tmp_path / "b.parquet")
    assert read_rows(tmp_path / "b.parquet")[0].messages == (user("i"), answer("o"))
