"""Packing loses nothing, overflows nothing, and is as tight as best fit promises."""

from __future__ import annotations

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from smedjan.data.pack import pack

CASES = st.integers(1, 60).flatmap(lambda most: st.tuples(st.lists(st.integers(1, most), max_size=60), st.just(most)))


@given(CASES)
def test_every_document_once_and_no_row_too_long(case: tuple[list[int], int]) -> None:
    lengths, max_length = case
    rows = pack(lengths, max_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= max_length for row in rows)
    assert all(rows)


@given(CASES)
def test_no_two_rows_could_be_one(case: tuple[list[int], int]) -> None:
    lengths, max_length = case
    filled = sorted(sum(lengths[index] for index in row) for row in pack(lengths, max_length))
    assert len(filled) < 2 or filled[0] + filled[1] > max_length
    assert len(filled) <= 2 * ceil(sum(lengths) / max_length)


@given(CASES)
def test_equals_best_fit_by_looking_at_every_row(case: tuple[list[int], int]) -> None:
    """The capacity index is only faster: a search of all rows for the fullest that fits makes the same ones."""
    lengths, max_length = case
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        free = [max_length - sum(lengths[other] for other in row) for row in rows]
        fitting = [(room, number) for number, room in enumerate(free) if room >= lengths[index]]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    assert pack(lengths, max_length) == rows


@given(CASES, st.randoms())
def test_the_number_of_rows_depends_on_the_lengths_alone(case: tuple[list[int], int], random: object) -> None:
    """What makes the data order a pure function of the step: every epoch has the same number of rows."""
    lengths, max_length = case
    shuffled = sorted(lengths, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert len(pack(shuffled, max_length)) == len(pack(lengths, max_length))


def test_a_known_case() -> None:
    assert pack([3, 7, 5, 5, 10], 10) == [[4], [1, 0], [2, 3]]
    assert pack([], 10) == []
