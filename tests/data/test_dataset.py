"""The data order is a pure function of (seed, step), sees every row once an epoch, and counts what it trains."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan.data.collate import Batch
from smedjan.data.dataset import Steps, TokenDataset
from smedjan.data.formats import Source
from smedjan.data.mask import Example


def dataset(lengths: list[int]) -> TokenDataset:
    """Row i holds tokens that only it holds, the last of them trained."""
    examples = []
    for number, length in enumerate(lengths):
        ids = 100 * (number + 1) + np.arange(length, dtype=np.int32)
        mask = np.arange(length) == length - 1
        source = Source(file=Path("a.jsonl"), line=number + 1)
        examples.append(Example(input_ids=ids, labels_mask=mask, source=source))
    return TokenDataset(examples)


def plan(lengths: list[int], **changes: Any) -> Steps:
    given: dict[str, Any] = {"seed": 0, "batch_size": 2, "grad_accum": 2, "epochs": 1, "max_length": 16} | changes
    return dataset(lengths).steps(**given)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
        for a, b in zip(one, other, strict=True)
    )


LENGTHS = [2, 9, 3, 5, 16, 4, 7, 2, 11, 6]


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_needs_nothing_of_the_steps_before(packing: bool) -> None:
    whole = plan(LENGTHS, steps=12, epochs=None, packing=packing)
    stepped = [whole.batches_for_step(step) for step in range(12)]
    for step in (11, 0, 7, 3):
        resumed = plan(LENGTHS, steps=12, epochs=None, packing=packing)
        assert same(resumed.batches_for_step(step), stepped[step])
    assert not same(stepped[0], plan(LENGTHS, seed=1, packing=packing).batches_for_step(0))


@settings(deadline=None)
@given(
    st.lists(st.integers(2, 16), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**63 - 1),
)
def test_every_row_once_an_epoch_and_every_step_full(
    lengths: list[int], batch_size: int, grad_accum: int, packing: bool, seed: int
) -> None:
    """Also where a step takes rows of several epochs."""
    steps = plan(lengths, batch_size=batch_size, grad_accum=grad_accum, packing=packing, seed=seed, epochs=3)
    units = [unit for step in range(len(steps)) for unit in steps.units_of_step(step)]
    assert len(units) == len(steps) * batch_size * grad_accum
    assert len(steps) == -(-3 * steps.units_per_epoch // (batch_size * grad_accum))
    seen = Counter(index for unit in units for index in unit)
    assert set(seen) == set(range(len(lengths)))
    assert min(seen.values()) >= 3
    extra = len(units) - 3 * steps.units_per_epoch
    assert sum(count - 3 for count in seen.values()) >= extra >= 0
    assert max(seen.values()) <= 3 + -(-extra // steps.units_per_epoch)
    for step in range(len(steps)):
        batches = steps.batches_for_step(step)
        assert [len(batch.input_ids) for batch in batches] == [batch_size] * grad_accum
        assert sum(batch.trained_tokens for batch in batches) == steps.trained_tokens_of_step(step)


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize(("batch_size", "grad_accum"), [(2, 2), (4, 1), (3, 3), (1, 4), (8, 1)])
def test_processes_share_the_rows_of_a_step(processes: int, batch_size: int, grad_accum: int) -> None:
    """The micro-batches of one process, unless there are fewer than processes: then no process waits for another that
    has more rows than the even share."""
    steps = plan(LENGTHS, batch_size=batch_size, grad_accum=grad_accum)
    one, shared = steps.batches_for_step(1), steps.batches_for_step(1, processes)
    if processes <= grad_accum:
        assert same(one, shared)
    rows = [len(batch.input_ids) for batch in shared]
    assert sum(rows) == batch_size * grad_accum
    assert max(rows) == min(batch_size, -(-batch_size * grad_accum // processes))
    assert sum(batch.trained_tokens for batch in shared) == steps.trained_tokens_of_step(1)
    tokens = [np.sort(np.concatenate([b.input_ids[b.input_ids > 0] for b in made])) for made in (one, shared)]
    assert np.array_equal(*tokens)


def test_rows_flow_over_the_end_of_an_epoch() -> None:
    steps = plan(LENGTHS[:6], epochs=2)
    rows = [index for step in range(3) for (index,) in steps.units_of_step(step)]
    assert sorted(rows) == sorted([*range(6), *range(6)])
    assert {len(steps.units_of_step(step)) for step in range(3)} == {4}
    assert (len(steps), steps.epoch_of_step(3)) == (3, 2.0)


def test_epochs_and_seeds_are_ordered_differently() -> None:
    lengths = [2] * 50
    orders = {
        (seed, epoch): tuple(
            index for step in range(epoch * 50, epoch * 50 + 50) for (index,) in steps.units_of_step(step)
        )
        for seed in (0, 1, 2)
        for steps in [plan(lengths, batch_size=1, grad_accum=1, seed=seed, epochs=3)]
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == 9
    assert all(sorted(order) == list(range(50)) for order in orders.values())


def test_the_order_is_pinned() -> None:
    """A run is resumed years later: these numbers must never change."""
    steps = plan([2] * 8, batch_size=8, grad_accum=1, seed=7, epochs=2)
    assert [index for (index,) in steps.units_of_step(0)] == [6, 3, 4, 0, 2, 7, 5, 1]
    assert [index for (index,) in steps.units_of_step(1)] == [1, 3, 2, 7, 4, 5, 0, 6]


@pytest.mark.parametrize(
    ("rows", "epochs", "expected"),
    [(30, 0.1, 1), (30, 0.2, 2), (40, 0.1, 1), (50, 0.1, 2), (4, 1, 1), (5, 1, 2), (1200, 2, 600), (1, 0.01, 1)],
)
def test_number_of_steps(rows: int, epochs: float, expected: int) -> None:
    assert len(plan([2] * rows, epochs=epochs)) == expected


def test_micro_batches_hold_rows_of_like_length() -> None:
    steps = plan([16, 2, 16, 2], epochs=1)
    long, short = steps.batches_for_step(0)
    assert (long.input_ids.shape, short.input_ids.shape) == ((2, 16), (2, 2))
    assert (long.kind, short.kind) == ("causal", "causal")


def test_packing_mixes_lengths_over_the_epoch() -> None:
    """Best fit opens its rows longest first; the epoch must not begin with them."""
    steps = plan([16] * 20 + [8] * 40, packing=True, batch_size=1, grad_accum=1)
    assert steps.units_per_epoch == 40
    sizes = [len(unit) for step in range(40) for unit in steps.units_of_step(step)]
    assert 3 <= sum(size == 2 for size in sizes[:20]) <= 17


def test_packed_and_padded_rows_train_the_same_tokens() -> None:
    def targets(packing: bool) -> Counter[int]:
        steps = plan(LENGTHS, packing=packing, batch_size=1, grad_accum=1)
        batches = [batch for step in range(len(steps)) for batch in steps.batches_for_step(step)]
        return Counter(int(label) for batch in batches for label in batch.labels.ravel() if label != -100)

    assert targets(True) == targets(False) == Counter(100 * (i + 1) + n - 1 for i, n in enumerate(LENGTHS))


def test_fingerprint_tells_data_apart() -> None:
    first = dataset(LENGTHS)
    assert first.fingerprint() == dataset(LENGTHS).fingerprint()
    flipped = replace(first.examples[0], labels_mask=~first.examples[0].labels_mask)
    others = [
        dataset([*LENGTHS, 2]),
        dataset([9, 2, *LENGTHS[2:]]),
        TokenDataset([flipped, *first.examples[1:]]),
        TokenDataset(first.examples[::-1]),
    ]
    assert len({first.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_evaluation_sees_every_row_once() -> None:
    rows = dataset(LENGTHS)
    batches = list(rows.batches(batch_size=4, max_length=16))
    assert [len(batch.input_ids) for batch in batches] == [4, 4, 2]
    assert sum(batch.tokens for batch in batches) == rows.tokens == sum(LENGTHS)
    assert sum(batch.trained_tokens for batch in batches) == rows.trained_tokens == len(LENGTHS)
