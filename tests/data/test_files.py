"""Files and folders as the Hub, `datasets` and mlx-lm lay them out, read one record at a time."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc, parquet

from smedjan.data.files import split_files
from smedjan.data.formats import read_rows, stream_rows
from smedjan.errors import DataError


def table(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pyarrow.table({"text": list(texts)})
    if path.suffix == ".parquet":
        parquet.write_table(made, path)
    else:
        with ipc.new_stream(path, made.schema) as stream:
            stream.write_table(made)
    return path


def texts(path: Path, split: str = "train") -> list[str]:
    return [row.text for row in read_rows(path, split)]


def test_folders_of_the_hub(tmp_path: Path) -> None:
    """`data/train-00000-of-00002-HASH.parquet`, and a folder for each split."""
    for number, text in enumerate(("a", "b")):
        table(tmp_path / "hashed" / "data" / f"train-0000{number}-of-00002-a09b74b3ef9c3b56.parquet", text)
        table(tmp_path / "nested" / "train" / f"000{number}.parquet", text)
    table(tmp_path / "nested" / "validation" / "0000.parquet", "v")
    assert texts(tmp_path / "hashed") == texts(tmp_path / "nested") == ["a", "b"]
    assert texts(tmp_path / "nested", "valid") == ["v"]
    assert split_files(tmp_path / "nested", "test") == ()
    table(tmp_path / "nested" / "train.parquet", "c")
    with pytest.raises(DataError, match=r"several train files: train.parquet, train/0000.parquet"):
        read_rows(tmp_path / "nested")
    (tmp_path / "nested" / "validation" / "more.jsonl").write_text('{"text": "w"}')
    with pytest.raises(DataError, match=r"files of several types: 0000.parquet, more.jsonl"):
        read_rows(tmp_path / "nested", "valid")


def saved(folder: Path, *texts: str, **state: object) -> None:
    """As `Dataset.save_to_disk` writes it (datasets 4: state.json, dataset_info.json, shards as Arrow streams)."""
    names = [f"data-{number:05}-of-{len(texts):05}.arrow" for number in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        table(folder / name, text)
    given = {"_data_files": [{"filename": name} for name in names], "_indices_files": None, "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(given))
    (folder / "dataset_info.json").write_text("{}")


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    saved(tmp_path / "one", "a", "b")
    assert texts(tmp_path / "one") == texts(tmp_path / "one", "test") == ["a", "b"]
    for split in ("train", "test"):
        saved(tmp_path / "dict" / split, split)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert (texts(tmp_path / "dict"), texts(tmp_path / "dict", "test")) == (["train"], ["test"])
    state = tmp_path / "one" / "state.json"
    for content, message in (
        ("[]", "is not the state of a saved dataset"),
        ("{", "is not the state of a saved dataset"),
        ('{"_data_files": [{"filename": "data-00009-of-00002.arrow"}]}', "which is not there"),
        ('{"_data_files": [{"filename": "../dict/train/data-00000-of-00001.arrow"}]}', "which is not there"),
        ('{"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}', "chooses rows by an index"),
    ):
        state.write_text(content)
        with pytest.raises(DataError, match=message) as caught:
            read_rows(tmp_path / "one")
        assert caught.value.file == str(state)


ROW = "x" * 2000
ROWS = 4000


def _jsonl(path: Path) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": ROW}) + "\n" for _ in range(ROWS))


def _csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([ROW] for _ in range(ROWS))


def _tables(path: Path) -> None:
    made = pyarrow.table({"text": [ROW] * ROWS})
    if path.suffix == ".parquet":
        parquet.write_table(made, path, use_dictionary=False)
    else:
        with ipc.new_file(path, made.schema) as stream:
            stream.write_table(made)


@pytest.mark.parametrize(
    ("suffix", "write"), [(".jsonl", _jsonl), (".csv", _csv), (".parquet", _tables), (".arrow", _tables)]
)
def test_rows_are_read_one_at_a_time(tmp_path: Path, suffix: str, write: Callable[[Path], None]) -> None:
    """8 MB of rows; at no time is an eighth of them there as Python objects."""
    path = tmp_path / f"rows{suffix}"
    write(path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_rows(path)) == ROWS
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < ROWS * len(ROW) / 8
