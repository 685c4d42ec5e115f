"""SQuAD's metrics are those of the evaluation script, as lm-evaluation-harness carries it."""

from __future__ import annotations

import random

import pytest

from smedjan.evaluate.answers import f1, judged, normalised

WORDS = ["The", "a", "an", "cat", "Cat.", "sat", "on", "mat!", "4", "14", "U.S.", "thé", "", "  ", "an-other"]


def test_normalised_and_f1_are_the_scripts():
    peer = pytest.importorskip("lm_eval.tasks.qasper.metrics")
    draw, matched = random.Random(0), 0
    for _ in range(500):
        one, other = (" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(2))
        assert normalised(one) == peer.normalize_answer(one)
        if normalised(one) or normalised(other):  # of two that say nothing version 1.1 has no opinion
            assert f1(one, other) == peer.f1_abstractive([one], [other])
            matched += f1(one, other) > 0
    assert matched > 100


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        (" Paris \n", ["Paris"], (1, 1, 1, 1)),
        ("the Paris.", ["Paris"], (0, 1, 1, 1)),
        ("It is Paris, I think", ["Rome", "Paris"], (0, 0, 1, 2 / 6)),
        ("14", ["4"], (0, 0, 0, 0)),
        ("", ["4"], (0, 0, 0, 0)),
        ("The", ["the"], (0, 1, 1, 1)),
    ],
)
def test_the_best_reference_counts(answer, references, expected):
    found = judged(answer, references)
    assert list(found) == ["exact_match", "normalised_match", "contains", "f1"]
    assert tuple(found.values()) == pytest.approx(expected)
