"""Data sets of a hub on this machine: the parquet files of the split, nothing else; what is said, and one line for what
can go wrong."""

from __future__ import annotations

import io
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from smedjan.data.formats import read_rows
from smedjan.errors import DataError
from smedjan.hf import dataset_hub
from smedjan.hf.dataset_hub import CONVERTED, data_path
from tests.hf.test_hub import Hub, Repository, commit_of, hub  # noqa: F401


def table(*texts: str) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": list(texts)}), out)
    return out.getvalue()


OTHERS = {"rows.py": b"raise SystemExit('run')", "README.md": b"# read me", "data/rows.bin": b"pickle"}
SHARDS = {f"data/train-0000{n}-of-00002-a09b74b3ef9c3b56.parquet": table(f"row {n}") for n in range(2)}
TEST = {"data/test-00000-of-00001.parquet": table("tested")}


@pytest.fixture
def published(hub: Hub) -> Hub:  # noqa: F811
    hub.repositories["org/rows"] = Repository({**OTHERS, **SHARDS, **TEST})
    return hub


def texts(name: str, split: str = "train", **options: object) -> list[str]:
    return [row.text for row in read_rows(data_path(name, split, **options), split)]  # type: ignore[arg-type]


def test_the_parquet_files_of_the_split_are_fetched_once(published: Hub) -> None:
    said: list[str] = []
    assert texts("org/rows", say=said.append) == ["row 0", "row 1"]
    assert published.fetched() == sorted(SHARDS)
    (line,) = said
    assert line.startswith(f"org/rows at {commit_of('main')[:12]}: 2 files to download, ")
    published.requests.clear()
    assert texts("org/rows", say=said.append) == ["row 0", "row 1"]
    assert (published.fetched(), len(said)) == ([], 1)
    assert texts("org/rows@refs/pr/1", "test") == ["tested"]
    assert published.fetched() == sorted(TEST)


def test_subsets(hub: Hub) -> None:  # noqa: F811
    hub.repositories["org/rows"] = Repository(
        {"en/train-00000-of-00001.parquet": table("hello"), "sv/train/0000.parquet": table("hej")}
    )
    assert (texts("org/rows:en"), texts("org/rows:sv")) == (["hello"], ["hej"])
    for name, message in (
        ("org/rows", "has several subsets: en, sv; name one of them: org/name:SUBSET"),
        ("org/rows:de", "has no parquet file of the split train in its subset 'de'"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            data_path(name, "train")
        assert caught.value.file == "org/rows"
    with pytest.raises(DataError, match=r"no parquet file of the split test \(en/train-00000-of-00001.parquet, sv/"):
        data_path("org/rows", "test")


def test_another_form_is_read_as_the_hub_converts_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """From the branch of conversions where main has no parquet; without a hub, from what the cache has of it."""
    repository = Repository({**OTHERS, "rows.csv": b"text\na"}, revisions=("main",))
    hub.repositories["org/rows"] = repository
    for revisions in (("main",), ("main", CONVERTED)):
        repository.revisions = revisions
        with pytest.raises(DataError, match="no parquet file of the split train; fetch what you want with hf download"):
            data_path("org/rows", "train")
    listed = dataset_hub.listing
    files = {"default/train/0000.parquet": table("converted")}

    def listing(repo: str, revision: str | None, kind: str) -> tuple:
        repository.files = files if revision == CONVERTED else {}
        return listed(repo, revision, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset_hub, "listing", listing)
    said: list[str] = []
    assert texts("org/rows", say=said.append) == ["converted"]
    assert said[0].startswith(f"org/rows at {commit_of(CONVERTED)[:12]}: 1 files")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert texts("org/rows") == ["converted"]


def test_without_the_hub_the_cache_serves(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    texts("org/rows")
    published.requests.clear()
    said: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert texts("org/rows", say=said.append) == ["row 0", "row 1"]
    assert said[0].startswith("org/rows: the hub is not asked (")
    with pytest.raises(DataError, match="is not in the cache, and the hub is not reached: ") as caught:
        data_path("org/other", "train")
    assert "check the connection and HF_HUB_OFFLINE, or give a file" in str(caught.value)
    with pytest.raises(DataError, match="is not in the cache, and the hub is not reached: "):
        data_path("org/rows", "test")
    assert published.requests == []


def test_one_line_for_what_the_hub_lacks(published: Hub) -> None:
    with pytest.raises(DataError, match="the hub has no such data set, or it is private") as caught:
        data_path("org/nothing", "train")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="the data set has no such branch, tag or commit"):
        data_path("org/rows@nowhere", "train")


def test_what_is_no_name_of_the_hub_is_a_path(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "rows").mkdir(parents=True)
    for path in ("my/rows", "my/rows.jsonl", "rows", "a/b/c", str(tmp_path / "x")):
        assert data_path(path, "train") == Path(path)
