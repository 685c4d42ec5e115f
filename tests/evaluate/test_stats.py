"""The intervals agree with scipy's own, are the same for the same seed, and cover what they claim to."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from smedjan.evaluate import stats
from smedjan.evaluate.stats import bootstrap_mean, bootstrap_paired_difference, bootstrap_ratio, wilson


@pytest.mark.parametrize("share", [0.05, 0.5, 0.94])
def test_bootstrap_agrees_with_scipys(share: float) -> None:
    values = (np.arange(300) < 300 * share).astype(float)
    ours = bootstrap_mean(values.tolist(), seed=1)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    # Means are multiples of 1/300; two independent runs of 10,000 resamples agree to about one of them.
    assert ours.estimate == pytest.approx(share, abs=1e-12)
    assert ours.low == pytest.approx(theirs.low, abs=1.5 / 300)
    assert ours.high == pytest.approx(theirs.high, abs=1.5 / 300)


def test_same_seed_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_memory_blocks_do_not_show_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i * i % 7) for i in range(50)]
    whole = bootstrap_mean(values, n=999)
    monkeypatch.setattr(stats, "_BLOCK", 777)
    assert bootstrap_mean(values, n=999) == whole


def test_paired_difference_uses_the_pairing() -> None:
    a = [1.0, 0.0] * 100
    b = [1.0, 0.0] * 99 + [0.0, 0.0]
    paired = bootstrap_paired_difference(a, b)
    assert paired.estimate == pytest.approx(0.005)
    # Unpaired, two shares of 200 would differ by +-0.1; paired, a single item does.
    assert paired.high - paired.low < 0.03
    with pytest.raises(AssertionError, match="same items"):
        bootstrap_paired_difference(a, b[:-1])


def test_a_ratio_is_scipys_and_a_mean_where_all_count_alike() -> None:
    generator = np.random.default_rng(4)
    counts = generator.integers(1, 40, size=80).astype(float)
    sums = counts * generator.normal(2.0, 0.5, size=80)
    ours = bootstrap_ratio(sums.tolist(), counts.tolist(), seed=1)
    theirs = scipy_stats.bootstrap(
        (sums, counts),
        lambda top, bottom, axis=-1: top.sum(axis) / bottom.sum(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(2),
    )
    assert ours.estimate == pytest.approx(sums.sum() / counts.sum())
    # An end of the interval is a quantile of 10,000 values: its standard error is about 0.027 of their spread.
    spread = theirs.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=5 * 2**0.5 * 0.027 * spread)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=5 * 2**0.5 * 0.027 * spread)
    values = [float(i * i % 7) for i in range(50)]
    same, mean = bootstrap_ratio(values, [1.0] * 50, seed=3), bootstrap_mean(values, seed=3)
    assert (same.low, same.high) == pytest.approx((mean.low, mean.high), rel=1e-12)


def test_constant_values_have_no_spread() -> None:
    interval = bootstrap_mean([0.25] * 7)
    assert (interval.low, interval.estimate, interval.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 7), (282, 300), (300, 300)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(successes: int, trials: int, level: float) -> None:
    ours = wilson(successes, trials, level=level)
    theirs = scipy_stats.binomtest(successes, trials).proportion_ci(confidence_level=level, method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)
    assert 0 <= ours.low <= ours.estimate <= ours.high <= 1


def test_bootstrap_covers_what_it_claims() -> None:
    """Of 200 samples of a coin of 0.7, about 95 % of the intervals hold 0.7; fewer than 90 % would be a defect."""
    generator = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        interval = bootstrap_mean((generator.random(100) < 0.7).tolist(), seed=trial, n=1000)
        held += interval.low <= 0.7 <= interval.high
    assert 180 <= held < 200
