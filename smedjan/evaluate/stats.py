"""Intervals for the figures that `eval` and the report show.

The bootstrap is the percentile one: resample n values with replacement, take the mean, and read the interval off the
quantiles of `n` such means. Wilson's interval is the closed form for a share of successes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

_BLOCK = 1 << 22
"""Values drawn at once: the bootstrap's memory does not grow with the number of resamples."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """`low <= estimate <= high` for a percentile or Wilson interval that covers `level` of the probability."""

    estimate: float
    low: float
    high: float
    level: float


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, n: int = 10_000, level: float = 0.95) -> Interval:
    """The mean of `values` [N] and its percentile-bootstrap interval; the same for the same seed on every machine."""
    data = np.asarray(values, dtype=np.float64)
    assert data.ndim == 1, f"values must be one row, got shape {data.shape}"
    assert data.size > 0, "no values to take a mean of"
    return _bootstrap(lambda rows: data[rows].mean(axis=1), data.size, seed=seed, n=n, level=level)


def bootstrap_paired_difference(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, n: int = 10_000, level: float = 0.95
) -> Interval:
    """mean(a - b) and its interval, where a[i] and b[i] are two systems' scores of the same item i."""
    assert len(a) == len(b), f"{len(a)} scores against {len(b)}: a paired difference needs the same items"
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return bootstrap_mean(difference.tolist(), seed=seed, n=n, level=level)


def bootstrap_ratio(
    sums: Sequence[float], counts: Sequence[float], *, seed: int = 0, n: int = 10_000, level: float = 0.95
) -> Interval:
    """sum(sums) / sum(counts) and its interval, items resampled whole: a mean over tokens, of which rows have several.

    sums, counts [N], counts positive. Tokens of a row are not independent, so rows are what is drawn.
    """
    top, bottom = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    assert top.shape == bottom.shape, f"{top.shape} sums of {bottom.shape} counts"
    assert top.size > 0, "nothing to take a ratio of"
    assert (bottom > 0).all(), "an item that counts for nothing"
    return _bootstrap(
        lambda rows: top[rows].sum(axis=1) / bottom[rows].sum(axis=1), top.size, seed=seed, n=n, level=level
    )


def _bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], size: int, *, seed: int, n: int, level: float
) -> Interval:
    """`statistic` maps indices of items [R, N] to R values; the estimate is that of every item once."""
    assert 0 < level < 1, level
    generator = np.random.Generator(np.random.PCG64(seed))
    made = np.empty(n)
    rows = max(1, _BLOCK // size)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        made[start:stop] = statistic(generator.integers(0, size, size=(stop - start, size)))
    low, high = np.quantile(made, [(1 - level) / 2, (1 + level) / 2])
    estimate = float(statistic(np.arange(size)[None])[0])
    return Interval(estimate=estimate, low=float(low), high=float(high), level=level)


def wilson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """(p + z^2/2N +- z sqrt(p(1-p)/N + z^2/4N^2)) / (1 + z^2/N), with p = successes / trials and N = trials.

    It stays within [0, 1], and is of use at 0 % and 100 %, where a bootstrap shows no spread.
    """
    assert 0 <= successes <= trials, f"{successes} of {trials}"
    assert trials > 0, "no trials to take a share of"
    assert 0 < level < 1, level
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At p = 0 and 1 one end is exact in algebra, not in floating point.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return Interval(estimate=p, low=low, high=high, level=level)
