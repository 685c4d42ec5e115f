"""What simple classifiers score on the notices that the fine-tuned model is tested on.

Four of them, each fitted on the same 1,200 rows: the commonest identifier; multinomial naive Bayes; tf-idf + logistic
regression as scikit-learn's defaults have it; and the same, tuned. The last is the one to beat: scikit-learn's default
tokeniser drops words of one character, and with them the 2 of "version 2", so that its defaults cannot tell most of
the GPL's versions apart. Regularisation and smoothing are chosen by cross-validation on the training rows alone.

    python examples/spdx/baselines.py OUT   # OUT: the folder that task.py wrote
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline

from smedjan.errors import DataError, SmedjanError
from smedjan.evaluate.stats import Interval, bootstrap_mean

Rows = list[dict[str, str]]
EVERY_WORD = r"(?u)\b\w+\b"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A classifier's answers on the test rows, in their order, and its accuracy with a 95 % bootstrap interval."""

    name: str
    answers: tuple[str, ...]
    correct: tuple[bool, ...]
    accuracy: Interval


def run(train: Rows, test: Rows, *, seed: int = 0) -> list[Baseline]:
    """Every baseline, weakest idea first."""
    notices = [row["prompt"] for row in train]
    labels = [row["completion"] for row in train]
    asked = [row["prompt"] for row in test]
    commonest = min(Counter(labels).items(), key=lambda kv: (-kv[1], kv[0]))[0]
    answers = {"majority": [commonest] * len(test)}
    for name, model in _classifiers().items():
        answers[name] = [str(answer) for answer in model.fit(notices, labels).predict(asked)]
    return [_score(name, given, test, seed) for name, given in answers.items()]


def _classifiers() -> dict[str, GridSearchCV | Pipeline]:
    bayes = Pipeline(
        [("words", CountVectorizer(ngram_range=(1, 2), token_pattern=EVERY_WORD)), ("classifier", MultinomialNB())]
    )
    default = Pipeline(
        [("words", TfidfVectorizer(ngram_range=(1, 2))), ("classifier", LogisticRegression(max_iter=2000))]
    )
    tuned = Pipeline(
        [
            ("words", TfidfVectorizer(ngram_range=(1, 2), token_pattern=EVERY_WORD)),
            ("classifier", LogisticRegression(max_iter=2000)),
        ]
    )
    return {
        "naive Bayes": GridSearchCV(bayes, {"classifier__alpha": [0.01, 0.03, 0.1, 0.3, 1.0]}, cv=3),
        "tf-idf + logistic regression, defaults": default,
        "tf-idf + logistic regression, tuned": GridSearchCV(tuned, {"classifier__C": [10.0, 100.0, 1000.0]}, cv=3),
    }


def _score(name: str, answers: list[str], test: Rows, seed: int) -> Baseline:
    correct = tuple(answer == row["completion"] for answer, row in zip(answers, test, strict=True))
    return Baseline(name=name, answers=tuple(answers), correct=correct, accuracy=bootstrap_mean(correct, seed=seed))


def read_rows(path: Path) -> Rows:
    """The rows of a JSON Lines file that task.py wrote."""
    try:
        with open(path, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except FileNotFoundError as error:
        raise DataError("no such file", file=path, remedy=f"python examples/spdx/task.py {path.parent}") from error
    except json.JSONDecodeError as error:
        raise DataError(str(error), file=path, remedy="write it again with examples/spdx/task.py") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds train.jsonl and test.jsonl")
    arguments = parser.parse_args()
    try:
        train, test = read_rows(arguments.folder / "train.jsonl"), read_rows(arguments.folder / "test.jsonl")
    except SmedjanError as error:
        print(error, file=sys.stderr)
        return 2
    for baseline in run(train, test):
        score = baseline.accuracy
        print(f"{baseline.name:40} {score.estimate:6.1%}   95 % interval {score.low:.1%} to {score.high:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
