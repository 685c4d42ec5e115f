"""Examples to one micro-batch of int64 arrays: padded on the right, or several documents packed into a row.

B: rows, T: tokens of a row, R: trained tokens. Labels are shifted already: `labels[b, t]` is the token that position t
is taught to predict, `input_ids[b, t + 1]`, where that token is trained and of the same document; elsewhere -100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from smedjan.data.example import Example

IGNORE = -100
"""The label of a position that is not trained, as in transformers."""

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """One micro-batch.

    kind "causal": every row is one document of T tokens. "padded": shorter rows are padded on the right, and
    `attention_mask` is there. "packed": some row holds several documents, `segment_ids` numbers them from 1 (0 is
    padding) and positions begin anew in each; a token attends to earlier tokens of its own document only.
    """

    input_ids: Int64Array
    """[B, T]"""
    position_ids: Int64Array
    """[B, T], counted from 0 in each document"""
    labels: Int64Array
    """[B, T], shifted; -100 where nothing is trained"""
    attention_mask: Int64Array | None
    """[B, T], 1 for tokens and 0 for padding; None when nothing is padded"""
    segment_ids: Int64Array | None
    """[B, T], the document of each token within its row; None unless packed"""
    loss_rows: Int64Array
    """[R], ascending indices b * T + t of the trained positions"""
    trained_tokens: int
    """R"""
    tokens: int
    """Tokens that are not padding"""
    kind: Literal["causal", "padded", "packed"]


def collate(rows: Sequence[Sequence[Example]], *, max_length: int, pad_to: int = 1, pad_id: int = 0) -> Batch:
    """One batch of `rows`, each a sequence of documents (one, unless packed).

    T is the longest row's length, rounded up to a multiple of `pad_to` but never beyond `max_length`. Padding is
    `pad_id`; it is masked by position, never by its id, for the pad token may well be the one that ends a document.
    """
    assert rows, "an empty batch"
    assert all(rows), "a row without a document"
    assert pad_to >= 1, pad_to
    lengths = [sum(map(len, documents)) for documents in rows]
    longest = max(lengths)
    assert longest <= max_length, f"a row of {longest} tokens for {max_length}"
    width = min(-(-longest // pad_to) * pad_to, max_length)
    packed = any(len(documents) > 1 for documents in rows)
    padded = min(lengths) < width

    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    position_ids = np.broadcast_to(np.arange(width, dtype=np.int64), shape).copy()
    segment_ids = np.zeros(shape, dtype=np.int64)
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, start=1):
            end = start + len(document)
            input_ids[row, start:end] = document.input_ids
            targets = np.where(document.labels_mask[1:], document.input_ids[1:], IGNORE)
            labels[row, start : end - 1] = targets
            segment_ids[row, start:end] = number
            if packed:
                position_ids[row, start:end] -= start
            start = end
        if packed:
            position_ids[row, start:] -= start
    loss_rows = np.flatnonzero(labels != IGNORE).astype(np.int64)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        labels=labels,
        attention_mask=(segment_ids > 0).astype(np.int64) if padded else None,
        segment_ids=segment_ids if packed else None,
        loss_rows=loss_rows,
        trained_tokens=len(loss_rows),
        tokens=sum(lengths),
        kind="packed" if packed else "padded" if padded else "causal",
    )
