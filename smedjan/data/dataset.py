"""The order of the data, a pure function of (seed, step): what a step trains on needs no memory of the steps before.

A *unit* is an example or, when packing, a packed row of examples. Epoch e is the units in an order drawn from
(seed, e); the epochs follow one another without a seam, and step s takes units [s * S, (s + 1) * S) of that sequence,
where S = batch_size * grad_accum: every step is full, and the last of an epoch takes its missing rows from the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smedjan.data.collate import Batch, collate
from smedjan.data.example import Example
from smedjan.data.pack import pack
from smedjan.data.tokens import Tokens

Unit = tuple[int, ...]
"""Indices of the examples of one row, in their order within it."""


class TokenDataset:
    """Examples in file order; at least one, each with at least one trained token."""

    def __init__(self, examples: Sequence[Example]) -> None:
        assert len(examples), "tokenize_rows never gives no examples"
        self.examples = Tokens.of(examples)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        return int(self.examples.ends[-1])

    @property
    def trained_tokens(self) -> int:
        return self.examples.trained_tokens

    def fingerprint(self) -> str:
        """sha256 of all tokens and masks, in order: a resumed run compares it, for a cursor into other data is void."""
        return self.examples.sha256

    def steps(
        self,
        *,
        seed: int,
        batch_size: int,
        grad_accum: int = 1,
        epochs: float | None = None,
        steps: int | None = None,
        packing: bool = False,
        max_length: int,
        pad_to: int = 1,
        pad_id: int = 0,
    ) -> Steps:
        """The steps of a run of `epochs` (a fraction is allowed) or of `steps`, one of which is given."""
        assert (epochs is None) != (steps is None), "give epochs or steps"
        plan = Steps(
            examples=self.examples,
            seed=seed,
            batch_size=batch_size,
            grad_accum=grad_accum,
            packing=packing,
            max_length=max_length,
            pad_to=pad_to,
            pad_id=pad_id,
            total=steps or 0,
        )
        if epochs is not None:
            plan = replace(plan, total=plan.num_steps(epochs))
        assert plan.total >= 1, plan.total
        return plan

    def batches(self, *, batch_size: int, max_length: int, pad_to: int = 1, pad_id: int = 0) -> Iterator[Batch]:
        """Every example once, the longest first, the last batch maybe smaller: for evaluation, which has no order."""
        order = np.argsort(-self.examples.lengths, kind="stable").tolist()
        for start in range(0, len(order), batch_size):
            rows = [(self.examples[index],) for index in order[start : start + batch_size]]
            yield collate(rows, max_length=max_length, pad_to=pad_to, pad_id=pad_id)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of a run, numbered from 0. Made by `TokenDataset.steps`."""

    examples: Tokens
    seed: int
    batch_size: int
    grad_accum: int
    packing: bool
    max_length: int
    pad_to: int
    pad_id: int
    total: int
    """Steps of the whole run."""
    _epochs: dict[int, _Epoch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.seed >= 0, self.seed
        assert self.batch_size >= 1, self.batch_size
        assert self.grad_accum >= 1, self.grad_accum

    def __len__(self) -> int:
        return self.total

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.grad_accum

    @property
    def units_per_epoch(self) -> int:
        """Rows of an epoch: the same in all, since how many rows packing makes depends on the lengths alone."""
        return len(self._epoch(0))

    def num_steps(self, epochs: float) -> int:
        """The least number of steps that sees `epochs` epochs, at least 1."""
        # repr: the decimal that was written, so that 0.1 of 30 rows is 3 rows, not 4
        return max(1, ceil(Fraction(repr(epochs)) * self.units_per_epoch / self.rows_per_step))

    def epoch_of_step(self, step: int) -> float:
        """Epochs seen before `step`."""
        return step * self.rows_per_step / self.units_per_epoch

    def units_of_step(self, step: int) -> list[Unit]:
        """The step's rows. The longest come first: rows of like length share a micro-batch, which wastes the least
        padding; the step's loss is a sum over all of them and does not know their order."""
        assert step >= 0, step
        first = step * self.rows_per_step
        units = [self._unit(index) for index in range(first, first + self.rows_per_step)]
        return sorted(units, key=self.length, reverse=True)

    def batches_for_step(self, step: int, processes: int = 1) -> list[Batch]:
        """The `grad_accum` micro-batches of the step, `batch_size` rows each. Of more processes than that each should
        have some: the same rows in as many smaller ones."""
        units, size = self.units_of_step(step), min(self.batch_size, -(-self.rows_per_step // processes))
        return [
            collate(
                [[self.examples[index] for index in unit] for unit in units[start : start + size]],
                max_length=self.max_length,
                pad_to=self.pad_to,
                pad_id=self.pad_id,
            )
            for start in range(0, len(units), size)
        ]

    def trained_tokens_of_step(self, step: int) -> int:
        """What the step's loss is divided by."""
        return sum(self.examples[index].trained_tokens for unit in self.units_of_step(step) for index in unit)

    def length(self, unit: Unit) -> int:
        """Tokens of a row."""
        return int(self.examples.lengths[list(unit)].sum())

    def _unit(self, index: int) -> Unit:
        epoch, within = divmod(index, self.units_per_epoch)
        return self._epoch(epoch)[within]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            # A memo, not a state. Epoch 0 stays, as its length is everyone's; of the others the latest two are enough
            for old in [kept for kept in self._epochs if kept not in (0, epoch - 1)]:
                del self._epochs[old]
            self._epochs[epoch] = self._make_epoch(epoch)
            assert len(self._epochs[epoch]) == self.units_per_epoch, "packing depends on lengths alone"
        return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> _Epoch:
        order, shuffle = _permutations(self.seed, epoch, len(self.examples))
        if not self.packing:
            return _Epoch(members=order, ends=np.arange(1, len(order) + 1))
        rows = pack(self.examples.lengths[order].tolist(), self.max_length)
        # Packing opens its rows longest document first: shuffle them, and keep each row's documents in drawn order
        chosen = [sorted(rows[row]) for row in shuffle.tolist() if row < len(rows)]
        return _Epoch(
            members=order[np.concatenate([np.array(row) for row in chosen])],
            ends=np.cumsum([len(row) for row in chosen]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Epoch(Sequence[Unit]):
    """The units of an epoch, in its order: unit i is members [ends[i - 1], ends[i])."""

    members: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        start = self.ends[index - 1] if index else 0
        return tuple(self.members[start : self.ends[index]].tolist())


def _permutations(seed: int, epoch: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two independent permutations of range(count).

    By sorting raw bits of PCG64: numpy promises the stream of a bit generator, but not what `Generator.permutation`
    makes of it, and a run may be resumed under another numpy.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    first, second = (np.argsort(bits.random_raw(count), kind="stable") for _ in range(2))
    return first, second
