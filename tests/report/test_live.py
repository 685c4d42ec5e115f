"""`report --live` writes the page again as the log grows, and an ordinary page when the run has ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smedjan.checkpoint.lock import RunLock
from smedjan.errors import DataError
from smedjan.report.live import follow

from .page import read
from .sample import LOG

HEADER = {
    "rows": {"kept": 64, "unstopped": 1, "trained_share": 0.5},
    "steps": {"total": 60},
    "optim": {"clip": 1.0, "lr": 1e-3},
    "memory": {"planned_bytes": 1, "baseline_bytes": 1},
    "versions": {"smedjan": "0.1.0"},
    "model": {"path": "base"},
}


def append(run: Path, *events: dict[str, object], end: str = "\n") -> None:
    with (run / "smedjan" / "log.jsonl").open("a") as file:
        file.write("\n".join(map(json.dumps, events)) + end)


def test_the_page_follows_the_run(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    with RunLock(tmp_path) as lock:
        lock.acquire()
        append(tmp_path, {"step": 0, "header": HEADER})
        pages = follow(tmp_path, target, live=True, look=0.0)
        next(pages)
        page = read(target.read_text())
        assert "Before its first step." in page.text
        assert "model.path base" in page.text
        append(tmp_path, *LOG[:5], {"step": 5, "samples": [{"prompt": "p", "text": "said so"}]}, end='\n{"step": 6, ')
        next(pages)
        page = read(target.read_text())
        assert "Step 5 of 60" in page.text
        assert "said so" in page.text
        assert "1 of 64" in page.text
        assert "cut off" not in page.text, "the run is writing that line"
        assert any(attributes.get("http-equiv") == "refresh" for _, attributes in page.elements)
    assert list(pages) == [target]
    page = read(target.read_text())
    assert not any(attributes.get("http-equiv") == "refresh" for _, attributes in page.elements)
    assert "cut off" in page.text


def test_a_run_that_has_not_written_its_log_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smedjan.report import live

    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            append(tmp_path, {"step": 0, "header": HEADER})

    monkeypatch.setattr(live.time, "sleep", sleep)
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert next(follow(tmp_path, tmp_path / "page.html", live=True)) == tmp_path / "page.html"
    assert len(waits) == 3


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training log"):
        list(follow(tmp_path, tmp_path / "page.html", live=True))
