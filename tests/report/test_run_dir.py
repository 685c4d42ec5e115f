"""A run directory is read as it is; what is malformed is named by file and field, what is absent is left out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from smedjan.errors import DataError
from smedjan.report.model import EvalPoint, Sample, Score, mistakes
from smedjan.report.run_dir import from_run

from .sample import EVALS, FILES, LOG, log_text, write_run


def test_everything_is_read(run_dir: Path) -> None:
    run = from_run(run_dir)
    assert run.title == "Notice to identifier"
    assert [step.step for step in run.steps] == list(range(1, 61))
    assert run.steps[9].loss == pytest.approx(0.4)
    assert run.steps[9].peak_bytes == 2_345_000_000
    assert run.evals == (EvalPoint(step=30, loss=0.2718), EvalPoint(step=60, loss=0.3141))
    assert run.evaluation is not None
    assert run.evaluation.scores[0] == Score(name="SmolLM2 + LoRA", share=0.943, interval=(0.917, 0.967), ours=True)
    assert [score.name for score in run.evaluation.scores] == ["SmolLM2 + LoRA", "majority", "tf-idf"]
    assert run.bench is not None
    assert run.bench.rounds == ((300.0, 200.0), (330.0, 220.0), (280.0, 200.0))
    assert run.parity is not None
    assert [case.verdict for case in run.parity.cases] == ["equal to the bit", "within bound", "out of bound"]
    assert run.plan is not None
    assert run.plan.nodes == 1604
    facts = dict(run.facts)
    assert facts["optim.lr"] == "0.001"
    assert facts["lora.targets"] == "q_proj, v_proj"
    assert facts["exact"] == "no"
    assert facts["tokens read"] == "24,000"
    assert facts["rows truncated"] == "3"


def test_a_log_alone_is_enough(tmp_path: Path) -> None:
    run = from_run(write_run(tmp_path, log_text(LOG[:3]), {}))
    assert (run.title, len(run.steps), run.evaluation, run.plan, run.notes) == ("run", 3, None, None, ())


def test_plan_says_what_run_does_not(tmp_path: Path) -> None:
    run = from_run(write_run(tmp_path, log_text(LOG[:3]), {"plan": {**FILES["plan"], "plan_hash": "cafe"}}))
    assert dict(run.facts)["plan hash"] == "cafe"


def test_a_resumed_run_keeps_the_later_row(tmp_path: Path) -> None:
    again = [{**LOG[1], "loss": 9.0}, LOG[2]]
    run = from_run(write_run(tmp_path, log_text([*LOG[:2], *again]), {}))
    assert [(step.step, step.loss) for step in run.steps] == [(1, 4.0), (2, 9.0), (3, pytest.approx(4 / 3))]


def test_a_last_line_cut_by_a_kill_is_said(tmp_path: Path) -> None:
    run = from_run(write_run(tmp_path, log_text(LOG[:2]) + '{"step": 3, "lo', {}))
    assert len(run.steps) == 2
    assert "cut off" in run.notes[-1]


def test_a_line_in_the_middle_that_does_not_parse_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path, log_text(LOG[:1]) + '{"step": 3, "lo\n' + log_text(LOG[1:2]), {})
    with pytest.raises(DataError) as error:
        from_run(run)
    assert (error.value.file, error.value.field) == (str(run / "smedjan" / "log.jsonl"), "line 2")


def test_not_a_run_directory(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="no training log") as error:
            from_run(where)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "path", "value", "field"),
    [
        ("eval", ("n",), "many", "n"),
        ("eval", ("exact_match",), 94.3, "exact_match"),
        ("eval", ("ci95",), [0.9], "ci95"),
        ("eval", ("baselines", 1, "name"), None, "baselines[1].name"),
        ("eval", ("difference", "ci95"), None, "difference.ci95"),
        ("eval", ("samples", 2, "answer"), 5, "samples[2].answer"),
        ("eval", ("samples",), {}, "samples"),
        ("bench", ("rounds", 0), [300, "fast"], "rounds[0]"),
        ("bench", ("rounds", 2), [300, 0], "rounds"),
        ("parity", ("cases", 0, "equal"), "yes", "cases[0].equal"),
        ("parity", ("cases", 1), 7, "cases[1]"),
        ("plan", ("ops", 1, "count"), 1.5, "ops[1].count"),
        ("run", ("notes",), [1], "notes"),
        ("run", ("versions",), "0.1", "versions"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, name: str, path: tuple[Any, ...], value: Any, field: str) -> None:
    files = copy.deepcopy(FILES)
    at: Any = files[name]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    run = write_run(tmp_path, log_text(LOG), files)
    with pytest.raises(DataError) as error:
        from_run(run)
    assert error.value.file == str(run / "smedjan" / f"{name}.json")
    assert error.value.field == field
    assert error.value.remedy
    assert "\n" not in str(error.value)


def test_a_step_without_its_number_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, log_text(LOG[:1]) + '{"loss": 1.0}\n', {})
    with pytest.raises(DataError, match="is missing") as error:
        from_run(run)
    assert error.value.field == "line 2.step"


def test_files_that_are_no_json(run_dir: Path) -> None:
    (run_dir / "smedjan" / "eval.json").write_text("{")
    with pytest.raises(DataError) as error:
        from_run(run_dir)
    assert error.value.file == str(run_dir / "smedjan" / "eval.json")


def test_mistakes_are_counted_and_ordered() -> None:
    samples = tuple(Sample(**sample) for sample in FILES["eval"]["samples"])
    first, second = mistakes(samples)
    assert (first.expected, first.answer, first.count, first.example) == ("ISC", "MIT", 2, "second notice\nSPDX: ")
    assert (second.expected, second.answer, second.count) == ("GPL-2.0-only", "", 1)
    assert mistakes(samples, limit=1) == (first,)


def test_the_fixture_is_what_json_would_give() -> None:
    assert json.loads(log_text(EVALS).splitlines()[1]) == EVALS[1]
