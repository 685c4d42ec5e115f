"""Sizes are read as transformers reads them, and what the disk lacks is said with both numbers."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.serialization._base import parse_size_to_int

from smedjan.checkpoint.sizes import format_size, free_bytes, parse_size, require_space
from smedjan.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("text", ["5GB", "200MB", "50kb", "1TB", "1.5GB", "0.25MB"])
def test_sizes_are_what_save_pretrained_takes_them_for(text: str) -> None:
    assert parse_size(text, "x") == parse_size_to_int(text)


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("1000", 1000), ("12B", 12), ("3 gb", 3_000_000_000), (" 2K", 2000)]
)
def test_more_ways_to_write_them(text: str | int, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["", "GB", "five", "5 G B", "5XB", "-1GB", "0", "0.1", "1e9", "5GBs", -1, 0])
def test_anything_else_names_the_field(text: str | int) -> None:
    with pytest.raises(ConfigError, match=r"is .*; give a size such as") as caught:
        parse_size(text, "max_shard_size")
    assert caught.value.field == "max_shard_size"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (999_499, "999 KB"), (999_500, "1 MB"), (5_120_000_000, "5.12 GB")],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


def test_what_does_not_fit_is_said_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the disk on which the folder will be made; exactly full is fine."""
    assert free_bytes(tmp_path / "not" / "yet") > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000 if path == tmp_path else 0))
    require_space(tmp_path / "not" / "yet", 2_000_000, "it")
    with pytest.raises(CheckpointError, match="it takes 3 MB, the disk has 2 MB free; free 1 MB, or use another disk"):
        require_space(tmp_path / "not" / "yet", 3_000_000, "it")
