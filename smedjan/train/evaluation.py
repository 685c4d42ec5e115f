"""The evaluation of a run: in batches that need no more memory than training does, and what comes of its losses."""

from __future__ import annotations

from collections.abc import Iterator

from smedjan.backends.collective import Alone, Collective
from smedjan.checkpoint.dtype import to_float32
from smedjan.data.collate import Batch, collate
from smedjan.data.dataset import TokenDataset
from smedjan.graph.program import Program
from smedjan.runtime.session import Session, bucket_rows
from smedjan.train.step import interleaved

PAD_TO = 16
"""Rows are padded to a multiple of this, so that a run needs few programs."""


def program_of(session: Session, batch: Batch) -> Program:
    """What `session.micro` runs for the loss alone."""
    rows = 0 if session.backend.exact else len(bucket_rows(batch.labels.reshape(-1)))
    return session.micro_program(session.form(batch, rows=rows), ())


def batches(
    session: Session, dataset: TokenDataset, *, batch_size: int, max_length: int, most_bytes: int | None
) -> Iterator[Batch]:
    """Every example once, the longest first, `batch_size` in a batch, or half as many as often as their program's peak
    would be above `most_bytes`: rows to evaluate on may be longer than any that is trained. One row is the least."""
    order = sorted(dataset.examples, key=len, reverse=True)
    while order:
        size = min(batch_size, len(order))
        while True:
            batch = collate([(each,) for each in order[:size]], max_length=max_length, pad_to=PAD_TO)
            if size == 1 or most_bytes is None or program_of(session, batch).peak_bytes <= most_bytes:
                break
            size = -(-size // 2)
        order = order[size:]
        yield batch


def evaluate_loss(
    session: Session,
    dataset: TokenDataset,
    *,
    batch_size: int,
    max_length: int,
    most_bytes: int | None = None,
    group: Collective | None = None,
) -> float:
    """Mean negative log-likelihood of the trained tokens. The processes of `group` share the batches."""
    group, losses = group or Alone(), []
    each = batches(session, dataset, batch_size=batch_size, max_length=max_length, most_bytes=most_bytes)
    for index, batch in enumerate(each):
        if index % group.world == group.rank:
            loss, _ = session.micro(batch, (), num_items=1.0)
            losses.append(float(to_float32(session.backend.to_raw(loss))[0]))
    return sum(interleaved(group.exchange(losses))) / dataset.trained_tokens
