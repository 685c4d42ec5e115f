"""Rows: every format gives the same rows; every bad row is one DataError that names its file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from smedjan.data.formats import Broken, Row, Source, left_out, read_rows, row_of, split_files, stream_rows
from smedjan.errors import DataError

PAIRS = [
    {"id": 1, "prompt": 'a, "quoted"\nprompt', "completion": "MIT"},
    {"id": 2, "prompt": "naïve 日本語 🙂", "completion": " Apache-2.0"},
]
CHAT = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "name": "x"}]},
    {"messages": [{"role": "system", "content": ""}, {"role": "assistant", "content": "yes"}]},
]


def write(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        table = pyarrow.Table.from_pylist(records)
        with ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


def content(rows: list[Row]) -> list[tuple]:
    return [(row.kind, row.text, row.prompt, row.completion, row.messages, row.prompt_messages) for row in rows]


def lines(path: Path, *texts: str | bytes) -> Path:
    path.write_bytes(b"\n".join(text.encode() if isinstance(text, str) else text for text in texts))
    return path


def refused(path: Path, field: str | None, message: str) -> DataError:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert (caught.value.file, caught.value.field) == (str(path), field)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_all_formats_give_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    rows = read_rows(write(tmp_path / f"rows{suffix}", PAIRS))
    assert [(row.kind, row.prompt, row.completion) for row in rows] == [
        ("prompt+completion", record["prompt"], record["completion"]) for record in PAIRS
    ]


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".arrow"])
def test_all_formats_give_the_same_messages(tmp_path: Path, suffix: str) -> None:
    """Arrow fills the `name` that only one message has with a null; the row must not show it."""
    expected = content(read_rows(write(tmp_path / "rows.jsonl", CHAT)))
    assert content(read_rows(write(tmp_path / f"rows{suffix}", CHAT))) == expected
    assert expected[0][4] == tuple(CHAT[0]["messages"])


def test_lines_are_physical_lines(tmp_path: Path) -> None:
    """Blank lines of JSONL and line breaks within CSV fields count; arrays and tables count rows."""
    jsonl = read_rows(write(tmp_path / "a.jsonl", PAIRS))
    table = read_rows(write(tmp_path / "a.csv", PAIRS))
    array = read_rows(write(tmp_path / "a.json", PAIRS))
    assert [row.source.field for row in jsonl] == ["line 1", "line 3"]
    assert [row.source.field for row in table] == ["line 2", "line 4"]
    assert [row.source.field for row in array] == ["row 1", "row 2"]
    assert (jsonl[1].file, jsonl[1].line) == (tmp_path / "a.jsonl", 3)


def test_json_may_hold_a_row_a_line_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.json", b'\xef\xbb\xbf{"text": "a"}', '{"text": "b"}')
    assert [row.text for row in read_rows(path)] == ["a", "b"]
    assert [row.text for row in read_rows(lines(tmp_path / "b.json", b'\xef\xbb\xbf [{"text": "a"}]'))] == ["a"]


def test_arrow_with_a_footer(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(PAIRS)
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    assert [row.completion for row in read_rows(tmp_path / "a.arrow")] == ["MIT", " Apache-2.0"]


def test_conversational_prompt_and_completion(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    (row,) = read_rows(write(tmp_path / "a.jsonl", [{"prompt": [user], "completion": [answer]}]))
    assert (row.kind, row.messages, row.prompt_messages) == ("prompt+completion", (user, answer), 1)


def test_a_long_csv_field_is_read_and_the_process_limit_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert before == 131_072, "an earlier test left the limit lifted"
    (row,) = read_rows(write(tmp_path / "a.csv", [{"text": "x" * (before + 1)}]))
    assert len(row.text) == before + 1
    assert csv.field_size_limit() == before


def test_tools_and_tool_calls(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    (row,) = read_rows(write(tmp_path / "a.jsonl", [{"messages": [call], "tools": [{"name": "f"}]}]))
    assert row.messages == ({"role": "assistant", "tool_calls": [{"name": "f"}]},)
    assert row.tools == ({"name": "f"},)
    (spelled,) = read_rows(write(tmp_path / "b.jsonl", [{"messages": [call], "tools": json.dumps([{"name": "f"}])}]))
    assert spelled.tools == row.tools


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "is not JSON"),
        ('{"text": "a"} {"text": "b"}', "is not JSON"),
        ('["a"]', "is a list, not an object"),
        ("null", "is null, not an object"),
        ('{"text": null}', r"lacks `text`.*keys: text"),
        ("{}", "keys: none"),
        ('{"text": ""}', "`text` is empty"),
        ('{"text": 3}', "`text` is a number, not a string"),
        ('{"text": true}', "`text` is a boolean"),
        ('{"text": ["a"]}', "`text` is a list"),
        ('{"text": "a\\ud800"}', "surrogate"),
        ('{"text": "a", "text": "b"}', "key 'text' is there twice"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "is not JSON we read"),
        ("[" * 100_000, "is not JSON we read"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        ('{"prompt": "a"}', "lacks `completion`"),
        ('{"completion": "a"}', "lacks `prompt`"),
        ('{"prompt": "a", "completion": ""}', "`completion` is empty"),
        ('{"prompt": "a", "completion": null}', "lacks `completion`"),
        ('{"prompt": "a", "completion": {"x": 1}}', "`completion` is an object"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "prompt is a string and completion"),
        ('{"prompt": "a", "completion": "b", "label": true}', "preference row"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "preference row"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', "2 types: text and prompt"),
        ('{"prompt": "a", "completion": "b", "label": 0}', "preference row"),
        ('{"chosen": "b", "rejected": "c"}', "preference row"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "{"}', "`tools` is not JSON"),
        ('{"messages": []}', "`messages` is empty"),
        ('{"messages": "hi"}', "`messages` is a string, not a list"),
        ('{"messages": ["hi"]}', r"`messages\[0\]` is a string"),
        ('{"messages": [{"role": "user"}]}', r"`messages\[0\]` lacks `content`"),
        ('{"messages": [{"content": "a"}]}', r"`messages\[0\]` lacks `role`"),
        ('{"messages": [{"role": "", "content": "a"}]}', r"`messages\[0\].role` is empty"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', r"content` is a list, not a string"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', r"`messages\[0\].content` is empty"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "surrogate"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": {}}', "`tools` is an object"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "a row of type messages, but .*line 1 is text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    refused(lines(tmp_path / "a.jsonl", '{"text": "good"}', "", line), "line 3", message)


def test_mixed_standard_and_conversational_rows(tmp_path: Path) -> None:
    chat = '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}'
    refused(lines(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}', chat), "line 2", "of messages")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_no_rows(tmp_path: Path, name: str) -> None:
    refused(lines(tmp_path / name, ""), None, "holds no row")


def test_no_rows_in_structured_files(tmp_path: Path) -> None:
    refused(lines(tmp_path / "a.json", "[]"), None, "holds no row")
    refused(lines(tmp_path / "a.csv", "text"), None, "holds no row")


def test_bad_json_arrays(tmp_path: Path) -> None:
    refused(lines(tmp_path / "a.json", "[", '{"text": "a"},', '{"text": }', "]"), "line 3", "is not JSON")
    refused(lines(tmp_path / "b.json", '[{"text": "a"}, {"text": 1}]'), "row 2", "`text` is a number")


def test_bad_csv(tmp_path: Path) -> None:
    refused(lines(tmp_path / "a.csv", "text,text", "a,b"), "line 1", "a column is named twice")
    excel = refused(lines(tmp_path / "g.csv", "prompt;completion", "a;b"), "line 1", "one column, 'prompt;completion'")
    assert excel.remedy == "separate columns by commas, not by ';'"
    refused(lines(tmp_path / "b.csv", "prompt,completion", "a,b", "a,b,c"), "line 3", "3 fields for 2 columns")
    refused(lines(tmp_path / "c.csv", "text", "a", '"b" c'), "line 3", "is not CSV")
    refused(lines(tmp_path / "d.csv", "text", "a", '"b'), "line 3", "is not CSV")
    refused(lines(tmp_path / "e.csv", "text", '""'), "line 2", "`text` is empty")
    refused(lines(tmp_path / "f.csv", b"text\n\xff"), "line 2", "is not UTF-8")


def test_a_row_of_another_width_says_which_field(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    over = refused(
        lines(path, "prompt,completion", "a,b", "Hello, you,there and everywhere else"), "line 3", "3 fields"
    )
    assert "3 fields for 2 columns (prompt, completion): none for 'there and everywhere els…'" in str(over)
    under = refused(lines(path, "prompt,completion", "a"), "line 2", "1 field for 2 columns")
    assert under.message.endswith("`completion` is not there")


BROKEN: dict[str, list[str | bytes]] = {
    ".jsonl": ['{"text": "a"}', '{"text": "b"', '{"text": 1}', b'{"text": "\xff"}', "", "[]", '{"text": "c"}'],
    ".json": ["[", '{"text": "a"}, {"text": ""}, 7, {"other": "b"}, {"text": null},', '{"text": "c"}', "]"],
    ".csv": ["id,text", "1,a", "2", "3,b,b", b"4,\xff", '5,""', "6,c"],
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_broken_rows_are_left_out_and_counted(tmp_path: Path, suffix: str) -> None:
    """The rows between them are those of a file without them, each with its own line; the first is told."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write(path, [{"text": "a"}, {"text": None}, {"text": ""}, {"text": None}, {"text": None}, {"text": "c"}])
    else:
        lines(path, *BROKEN[suffix])
    broken = Broken("drop")
    rows = list(stream_rows(path, broken=broken))
    assert [row.text for row in rows] == ["a", "c"]
    assert broken.count == 4
    with pytest.raises(DataError) as first:
        read_rows(path)
    assert str(broken.first) == str(first.value)
    last = {".jsonl": "line 7", ".json": "row 6", ".csv": "line 7", ".parquet": "row 6"}[suffix]
    assert [row.source.field for row in rows][1:] == [last]
    said = left_out(broken.count, broken.first)
    assert said == f"{path}: 4 broken rows are left out; the first: {first.value.field}: {first.value.message}"


def test_what_no_row_alone_is_to_blame_for_stays_an_error(tmp_path: Path) -> None:
    """Where it is open how much would be left out, or everything would."""

    def dropping(path: Path, message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            list(stream_rows(path, broken=Broken("drop")))
        assert "\n" not in str(caught.value)

    dropping(lines(tmp_path / "a.csv", "text", "a", '"b', "c", "d"), "is not CSV")
    dropping(lines(tmp_path / "b.json", '[{"text": "a"},', '{"text": }]'), "is not JSON")
    dropping(lines(tmp_path / "c.jsonl", '{"text": "a"}', '{"prompt": "a", "completion": "b"}'), "a row of type")
    dropping(lines(tmp_path / "d.jsonl", '{"text": ""}', "{"), "no row is left, 2 are broken; line 1: `text` is empty")
    dropping(lines(tmp_path / "e.csv", b"t\xff,b", "1,2"), "line 1: is not UTF-8")
    dropping(lines(tmp_path / "f.csv", "text,text", "1,2"), "a column is named twice")


def test_the_error_names_the_flag_that_goes_on(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.csv", "text", '""')
    with pytest.raises(DataError) as caught:
        list(stream_rows(path, broken=Broken(flag="--train.broken")))
    assert str(caught.value) == (
        f"{path}: line 2: `text` is empty; fill `text`, or remove the row; --train.broken drop leaves broken rows out"
    )


def test_bad_arrow_files(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        path = write(tmp_path / name, PAIRS)
        path.write_bytes(path.read_bytes()[:-60])
        refused(path, None, f"is no {path.suffix[1:]} file")
        refused(lines(path, "text"), None, f"is no {path.suffix[1:]} file")
    path = write(tmp_path / "b.parquet", [{"text": "a"}, {"text": None}])
    refused(path, "row 2", "lacks `text`")
    strings = pyarrow.array([b"good", b"\xff"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "c.parquet")
    refused(tmp_path / "c.parquet", None, "not UTF-8")
    refused(lines(tmp_path / "d.parquet", ""), None, "is no parquet file")
    (tmp_path / "e.arrow").touch()
    refused(tmp_path / "e.arrow", None, "is no arrow file")


def test_unknown_and_missing_files(tmp_path: Path) -> None:
    refused(lines(tmp_path / "a.txt", "hello"), None, "unknown file type '.txt'")
    refused(tmp_path / "absent.jsonl", None, "no such file or folder")


def test_folder_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PAIRS)
    write(tmp_path / "validation.csv", PAIRS[:1])
    (tmp_path / "README.md").write_text("rows")
    assert len(read_rows(tmp_path)) == 2
    assert len(read_rows(tmp_path, "valid")) == 1
    assert split_files(tmp_path, "test") == ()
    with pytest.raises(DataError, match=r"no test file in this folder \(train.jsonl, validation.csv\)"):
        read_rows(tmp_path, "test")
    write(tmp_path / "val.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"several valid files: val.jsonl, validation.csv"):
        read_rows(tmp_path, "valid")


def test_folder_shards_are_read_in_order_and_all_must_be_there(tmp_path: Path) -> None:
    write(tmp_path / "train-00001-of-00002.parquet", PAIRS[1:])
    with pytest.raises(DataError, match="1 of 2 train shards"):
        read_rows(tmp_path)
    write(tmp_path / "train-00000-of-00002.parquet", PAIRS[:1])
    assert [row.completion for row in read_rows(tmp_path)] == ["MIT", " Apache-2.0"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
    ),
    max_leaves=8,
)
KEYS = ["text", "prompt", "completion", "messages", "tools", "label", "conversations"]
KEYS += ["instruction", "input", "output", "system", "history"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON) | JSON)
def test_any_record_is_a_row_or_a_data_error(record: object) -> None:
    """Nothing a file can say escapes as another exception."""
    try:
        row = row_of(record, Source(file=Path("a.jsonl"), line=7))
    except DataError as error:
        where, row = str(error), None
    assert row or where.startswith("a.jsonl: line 7: ")
    assert row is None or row.text or row.completion or row.messages
