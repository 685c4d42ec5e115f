"""Whether a generated answer is right, as SQuAD's evaluation script judges it (version 2.0; Rajpurkar et al. 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(answer: str, reference: str) -> float:
    """2pr / (p + r) of the words in both, normalised: p of the answer's words, r of the reference's."""
    given, wanted = normalised(answer).split(), normalised(reference).split()
    common = sum((Counter(given) & Counter(wanted)).values())
    if not common:
        return float(given == wanted)  # both empty
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def judged(answer: str, references: Sequence[str]) -> dict[str, float]:
    """The best over the references, of each metric.

    exact_match       the same but for white space at the ends
    normalised_match  the same, normalised
    contains          the reference's words follow one another in the answer's, both normalised
    f1                of the words, normalised
    """
    plain = normalised(answer)
    return {
        "exact_match": float(any(answer.strip() == wanted.strip() for wanted in references)),
        "normalised_match": float(any(plain == normalised(wanted) for wanted in references)),
        "contains": float(any(f" {normalised(wanted)} " in f" {plain} " for wanted in references)),
        "f1": max(f1(answer, wanted) for wanted in references),
    }
