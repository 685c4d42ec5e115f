"""The largest micro-batch that a run can meet, by which its memory is planned."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from smedjan.graph.program import Program
from smedjan.models.decoder import Form
from smedjan.runtime.session import ROW_BUCKET
from smedjan.train.step import Trainer

if TYPE_CHECKING:
    from smedjan.train.finetune import Finetune


def largest_form(parts: Finetune, dtype: str) -> Form:
    """Full rows of the longest example, with the most trained tokens that any has."""
    train = parts.config.train
    longest = parts.max_length if train.packing else max(map(len, parts.dataset.examples))
    seq = min(-(-longest // 16) * 16, parts.max_length)
    trained = max(example.trained_tokens for example in parts.dataset.examples) * train.batch_size
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


def largest_program(parts: Finetune, trainer: Trainer) -> Program:
    """Planned in a session without weights, and not run: the largest micro-batch may never come, and its program would
    stay."""
    session = replace(trainer.session, parameters={})
    return session.micro_program(largest_form(parts, session.dtype), trainer.names)


def planned_bytes(trainer: Trainer, program: Program) -> int:
    """What a run takes above its imported libraries: the largest micro-batch's arrays, the optimizer's state, and what
    libraries take besides."""
    backend = trainer.session.backend
    return program.peak_bytes + trainer.optimizer.state_bytes(trainer.shapes) + backend.library_bytes
