"""The legs of a run, from its log: who took which steps, and when."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from smedjan.cli import app
from smedjan.errors import DataError
from smedjan.report.history import history
from smedjan.train.header import machine
from smedjan.train.log import RunLog


def header(step: int, name: str, backend: str, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "header": {
            "steps": {"total": 30, "done": step, "again": 0},
            "backend": backend,
            "device": "metal" if backend == "mlx_metal" else "cpu",
            "exact": backend == "torch_reference",
            "plan_hash": "0123456789abcdef",
            "machine": {"name": name, "system": "Linux x86_64"},
            "processes": 1,
            "versions": {"smedjan": "0.1.0", "python": "3.11.1", "mlx": "0.32.0"},
            "began": f"2026-01-01T00:00:{step:02}+00:00",
            **more,
        },
    }


def step(number: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": number, "loss": loss, "at": f"2026-01-01T00:01:{number:02}+00:00", **more}


def write(tmp_path: Path, *events: dict[str, Any], tail: str = "") -> Path:
    (tmp_path / "smedjan").mkdir(parents=True)
    text = "".join(json.dumps(event) + "\n" for event in events)
    (tmp_path / "smedjan" / "log.jsonl").write_text(text + tail)
    return tmp_path


def test_legs_begin_at_headers(tmp_path: Path) -> None:
    run = write(
        tmp_path,
        header(0, "laptop", "mlx_metal"),
        step(1, 3.0),
        {"step": 1, "eval_loss": 2.9},
        step(2, 2.5),
        header(2, "rack", "cuda_triton"),
        step(3, None),
        tail='{"step": 4, "lo',
    )
    found = history(run)
    assert (found.steps, found.total_steps) == (3, 30)
    first, second = found.legs
    assert (first.machine, first.backend, first.device, first.exact) == ("laptop", "mlx_metal", "metal", False)
    assert (first.first_step, first.last_step, first.steps) == (1, 2, 2)
    assert (first.first_loss, first.last_loss) == (3.0, 2.5)
    assert (first.began, first.ended) == ("2026-01-01T00:00:00+00:00", "2026-01-01T00:01:02+00:00")
    assert first.versions == {"smedjan": "0.1.0", "python": "3.11.1", "mlx": "0.32.0"}
    assert (second.machine, second.first_step, second.last_step) == ("rack", 3, 3)
    assert (second.first_loss, second.last_loss) == (None, None)


def test_a_leg_of_which_nothing_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, header(0, "a", "cpu_native"), header(0, "b", "cpu_native", steps={"total": 2, "again": 1}))
    lost, other = history(run).legs
    assert (lost.steps, lost.first_step, lost.ended, other.again) == (0, None, None, 1)
    assert app.run(["run", "history", str(run)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{run}: 0 of 2 steps in 2 legs"
    assert shown[2].startswith("none kept  a ")


def test_a_log_of_an_older_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which said neither machine nor time, and once had no header."""
    run = write(tmp_path, {"step": 1, "loss": 1.0}, {"step": 1, "header": {"backend": "cpu_native"}})
    first, second = history(run).legs
    assert (first.machine, first.backend, first.began, first.last_step) == (None, None, None, 1)
    assert (second.machine, second.backend, second.versions, second.again) == (None, "cpu_native", {}, 0)
    assert app.run(["run", "history", str(run)]) == 0
    assert "unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("[]\n", "an object is expected"),
        ('{"step": 1\n', "line 1"),
        ('{"header": {"machine": "m"}}\n', "machine"),
        ('{"header": {"backend": 3}}\n', "backend: text is expected"),
        ('{"loss": 1.0}\n', "step: is missing"),
    ],
)
def test_a_damaged_log_is_one_line(tmp_path: Path, tail: str, said: str) -> None:
    run = write(tmp_path, tail=tail)
    with pytest.raises(DataError) as raised:
        history(run)
    assert said in str(raised.value)
    assert str(run / "smedjan" / "log.jsonl") in str(raised.value)


def test_a_machine_is_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "forge.home.example")
    assert machine()["name"] == "forge"
    monkeypatch.setattr(platform, "node", lambda: "")
    assert machine()["name"] == "unknown"


def test_steps_that_are_taken_again_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, step(1, 1.0), step(2, 1.0), {"step": 3, "eval_loss": 1.0}, step(3, 1.0)) / "smedjan"
    assert RunLog(path / "log.jsonl", 1, None).again == 2
    assert RunLog(path / "log.jsonl", 1, None).again == 0
