"""Choosing a token from logits, in transformers' order: repetition penalty, temperature, top-k, top-p, min-p."""

from __future__ import annotations

from collections.abc import Sequence
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
            ("seed", self.seed >= 0),
        ):
            if not good:
                raise ConfigError(
                    f"{getattr(self, name)} is out of range", field=name, remedy="see smedjan generate --help"
                )

    @property
    def plain(self) -> bool:
        """Whether the logits alone decide: the likeliest token, whatever came before."""
        return self.temperature == 0 and self.repetition_penalty in (None, 1.0)


def choose(logits: np.ndarray, seen: Sequence[int], sampling: Sampling, step: int) -> int:
    """The next token of one sequence.       logits float32 [V]; `seen` holds prompt and output so far.

    The draw of step t depends on (seed, t) alone, so that a stream can be resumed.
    """
    scores = warp(logits, seen, sampling)
    if sampling.temperature == 0:
        return int(scores.argmax())
    kept = np.flatnonzero(scores > -np.inf)
    probabilities = np.exp((scores[kept] - scores[kept].max()).astype(np.float64))
    cumulative = np.cumsum(probabilities)
    cumulative /= cumulative[-1]  # ends at one exactly: no draw lies past the last token that may be drawn
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([sampling.seed, step]))).random()
    return int(kept[np.searchsorted(cumulative, draw, side="right")])


def warp(logits: np.ndarray, seen: Sequence[int], sampling: Sampling) -> np.ndarray:
    """The scores that transformers' logits processors leave, float32 [V]: -inf where a token may not be drawn.

    Each step is theirs, in float32: s * penalty where s < 0 else s / penalty, once for each token seen (Keskar et al.
    2019); s / temperature; no token below the k-th (equals of it stay); of the tokens in ascending order those whose
    cumulated probability is at most 1 - top_p go (Holtzman et al. 2020), but never the last; and those with less than
    min_p times the largest probability (Nguyen et al. 2024). Where top-p ends between equals, the ones of higher number
    stay here, and any of them there, since torch.sort is not stable.
    """
    scores = logits.astype(np.float32, copy=True)
    if sampling.repetition_penalty not in (None, 1.0) and len(seen):
        index = np.unique(np.asarray(seen, dtype=np.int64))
        penalty = np.float32(sampling.repetition_penalty)
        scores[index] = np.where(scores[index] < 0, scores[index] * penalty, scores[index] / penalty)
    if sampling.temperature == 0:
        return scores
    scores /= np.float32(sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p is not None and sampling.top_p < 1:
        kept = np.flatnonzero(scores > -np.inf)
        order = kept[np.argsort(scores[kept], kind="stable")]
        # Summed in float64 and rounded, as torch.cumsum does.
        below = np.cumsum(_softmax(scores[order]), dtype=np.float64).astype(np.float32)
        scores[order[:-1][below[:-1] <= np.float32(1 - sampling.top_p)]] = -np.inf
    if sampling.min_p is not None:
        probabilities = _softmax(scores)
        scores[probabilities < np.float32(sampling.min_p) * probabilities.max()] = -np.inf
    return scores


def _softmax(scores: np.ndarray) -> np.ndarray:
    """float32, as the processors take it. Its sum is float64's, rounded: numpy's own hangs on the machine's vectors."""
    exp = np.exp(scores - scores.max())
    return exp / np.float32(exp.sum(dtype=np.float64))
