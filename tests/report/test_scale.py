"""Ticks are round and inside the range, pixels are monotone, figures read as they should."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smedjan.report.scale import Scale, byte_size, number, over, percent, wants_log

positive = st.floats(min_value=1e-9, max_value=1e9)


@given(st.lists(positive, min_size=1, max_size=20), st.booleans(), st.integers(3, 8))
def test_ticks_and_pixels(values: list[float], log: bool, about: int) -> None:
    scale = over(values, 10, 200, log=log)
    ticks = scale.ticks(about)
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (scale.high - scale.low)
    assert all(scale.low - slack <= tick <= scale.high + slack for tick in ticks)
    assert len(ticks) <= 2 * about + 1
    for value in values:
        assert 10 - 1e-6 <= scale(value) <= 200 + 1e-6
    ordered = sorted(values)
    assert [scale(value) for value in ordered] == sorted(scale(value) for value in ordered)


@given(st.lists(positive, min_size=2, max_size=9))
def test_linear_axes_have_ticks(values: list[float]) -> None:
    assert len(over(values, 0, 100).ticks(5)) >= 2


def test_examples_of_ticks() -> None:
    assert Scale(low=0, high=341, start=0, stop=1).ticks(4) == [0, 100, 200, 300]
    assert Scale(low=0.003, high=7, start=0, stop=1, log=True).ticks(5) == [0.01, 0.1, 1.0]
    assert Scale(low=0.9, high=12, start=0, stop=1, log=True).ticks(5) == [1, 2, 5, 10]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0613, "0.0613"),
        (276.123, "276.1"),
        (1204.0, "1,204"),
        (0.1, "0.1"),
        (-2.5, "-2.5"),
        (0.0, "0"),
        (3.2e-5, "3.2e-5"),
        (1e-9, "1e-9"),
        (12_345_678.0, "1.23e7"),
        (0.001, "0.001"),
        (float("nan"), "nan"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12))
def test_number_is_within_half_a_thousandth(value: float) -> None:
    written = float(number(value).replace(",", ""))
    assert math.isclose(written, value, rel_tol=6e-3, abs_tol=1e-300)


def test_other_figures() -> None:
    assert percent(0.9434) == "94.3 %"
    assert byte_size(2_345_000_000) == "2.3 GB"
    assert byte_size(999) == "999 B"
    assert wants_log([0.01, 5.0, float("nan")])
    assert not wants_log([0.01, 0.2])
    assert not wants_log([0.0, 5.0])
    assert not wants_log([])
