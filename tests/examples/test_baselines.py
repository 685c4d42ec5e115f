"""The baselines are fair: they score what they answer, and the tuned one sees words of one character."""

from __future__ import annotations

from pathlib import Path

import baselines
import pytest

from smedjan.errors import DataError


def rows(*pairs: tuple[str, str]) -> baselines.Rows:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def versions(count: int) -> baselines.Rows:
    """Notices told apart by a digit alone, with three of four of version 2."""
    return rows(
        *[
            (
                f"file {'abcdefgh'[i % 8]}{i} under version {3 if i % 4 == 0 else 2} of the licence",
                f"L-{3 if i % 4 == 0 else 2}",
            )
            for i in range(count)
        ]
    )


def test_scores() -> None:
    train, test = versions(80), versions(40)
    scored = {baseline.name: baseline for baseline in baselines.run(train, test)}
    assert list(scored) == [
        "majority",
        "naive Bayes",
        "tf-idf + logistic regression, defaults",
        "tf-idf + logistic regression, tuned",
    ]
    assert set(scored["majority"].answers) == {"L-2"}
    assert scored["majority"].accuracy.estimate == pytest.approx(0.75)
    assert scored["tf-idf + logistic regression, tuned"].accuracy.estimate == 1.0
    # Its tokeniser drops the digit: all that is left is the majority (and names that it has learnt by heart).
    assert scored["tf-idf + logistic regression, defaults"].accuracy.estimate < 0.95
    for baseline in scored.values():
        right = [given == row["completion"] for given, row in zip(baseline.answers, test, strict=True)]
        assert list(baseline.correct) == right
        assert baseline.accuracy.estimate == pytest.approx(sum(right) / len(right))
        assert baseline.accuracy.low <= baseline.accuracy.estimate <= baseline.accuracy.high


def test_rows_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file") as error:
        baselines.read_rows(tmp_path / "train.jsonl")
    assert "task.py" in (error.value.remedy or "")
    (tmp_path / "train.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match="Expecting value"):
        baselines.read_rows(tmp_path / "train.jsonl")
