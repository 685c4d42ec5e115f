"""Choosing a token from logits, in transformers' order: repetition penalty, temperature, top-k, top-p, min-p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smedjan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 takes the likeliest token; the rest as in transformers' GenerationConfig."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good in (
            ("temperature", self.temperature >= 0),
            ("top_k", self.top_k is None or self.top_k >= 1),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0),
        ):
            if not good:
                raise ConfigError(
                    f"{getattr(self, name)} is out of range", field=name, remedy="see smedjan generate --help"
                )


def choose(logits: np.ndarray, seen: list[int], sampling: Sampling, step: int) -> int:
    """The next token of one sequence.       logits float32 [V]; `seen` holds prompt and output so far.

    The draw of step t depends on (seed, t) alone, so that a stream can be resumed.
    """
    scores = logits.astype(np.float32, copy=True)
    if sampling.repetition_penalty not in (None, 1.0):
        index = np.unique(np.asarray(seen, dtype=np.int64))
        penalty = np.float32(sampling.repetition_penalty)
        scores[index] = np.where(scores[index] < 0, scores[index] * penalty, scores[index] / penalty)
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores /= np.float32(sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    probabilities = _softmax(scores)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= sampling.top_p]] = 0.0
    if sampling.min_p is not None:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0.0
    cumulative = np.cumsum(probabilities)
    cumulative /= cumulative[-1]  # ends at one exactly: no draw lies past the last token that may be drawn
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([sampling.seed, step]))).random()
    return int(np.searchsorted(cumulative, draw, side="right"))


def _softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp((scores - scores.max()).astype(np.float64))
    return exp / exp.sum()
