"""The largest micro-batch that a run can meet, by which its memory is planned."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

from smedjan.backends.base import Forms
from smedjan.data.dataset import Steps
from smedjan.graph.program import Program
from smedjan.models.decoder import Form
from smedjan.runtime.session import ROW_BUCKET
from smedjan.train.evaluation import PAD_TO
from smedjan.train.outline import Planned

if TYPE_CHECKING:
    from smedjan.train.parts import Finetune


def largest_form(parts: Finetune, dtype: str, seq: int | None = None) -> Form:
    """Full rows of the longest example, with the most trained tokens that any has. With `seq`, of rows that long, of
    which as large a share is trained."""
    train, examples = parts.config.train, parts.dataset.examples
    longest, most = max(map(len, examples)), max(example.trained_tokens for example in examples)
    if train.packing:  # what fills a row may be all of the kind that is trained most
        longest, most = parts.max_length, ceil(parts.max_length * max(e.trained_tokens / len(e) for e in examples))
    padded = min(-(-longest // PAD_TO) * PAD_TO, parts.max_length)
    seq = padded if seq is None else seq
    if seq > padded:
        most = -(-most * seq // longest)
    trained = most * train.batch_size
    rows = 0 if parts.backend.exact else min(-(-trained // ROW_BUCKET) * ROW_BUCKET, seq * train.batch_size)
    return Form(
        batch=train.batch_size,
        seq=seq,
        dtype=dtype,
        kind="packed" if train.packing else "padded",
        attention=train.attention,
        rows=rows,
        positions=train.batch_size if train.packing else 1,
    )


def largest_program(parts: Finetune, trainer: Planned, *, accumulate: bool = False) -> Program:
    """Planned in a session without weights, and not run: the largest micro-batch may never come, and its program would
    stay."""
    session = replace(trainer.session, parameters={})
    return session.micro_program(largest_form(parts, session.dtype), trainer.names, accumulate=accumulate)


def forms_met(steps: Steps, most: int = 1000) -> Forms:
    """Of the run's micro-batches, in as many steps as `most`."""
    lengths: set[int] = set()
    rows: set[tuple[int, int]] = set()
    for step in range(min(steps.total, most)):
        units = steps.units_of_step(step)
        for start in range(0, len(units), steps.batch_size):
            batch = units[start : start + steps.batch_size]
            length = -(-max(map(steps.length, batch)) // steps.pad_to)
            trained = sum(steps.examples[index].trained_tokens for unit in batch for index in unit)
            lengths.add(length)
            rows.add((length, -(-trained // ROW_BUCKET)))
    return Forms(lengths=len(lengths), rows=len(rows))
