"""Batches: labels shifted within a document, positions and segments by document, padding at the right place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smedjan.data.collate import IGNORE, collate
from smedjan.data.formats import Source
from smedjan.data.mask import Example

SOURCE = Source(file=Path("a.jsonl"), line=1)


def example(ids: list[int], mask: list[int]) -> Example:
    return Example(input_ids=np.array(ids, dtype=np.int32), labels_mask=np.array(mask, dtype=bool), source=SOURCE)


A = example([11, 12, 13, 14], [0, 0, 1, 1])
B = example([21, 22, 23], [1, 1, 1])


def test_causal() -> None:
    batch = collate([[A], [A]], max_length=8)
    assert batch.kind == "causal"
    assert batch.input_ids.tolist() == [[11, 12, 13, 14]] * 2
    assert batch.labels.tolist() == [[-100, 13, 14, -100]] * 2
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert (batch.attention_mask, batch.segment_ids) == (None, None)
    assert batch.loss_rows.tolist() == [1, 2, 5, 6]
    assert (batch.trained_tokens, batch.tokens) == (4, 8)


def test_padded() -> None:
    batch = collate([[A], [B]], max_length=8, pad_id=9)
    assert batch.kind == "padded"
    assert batch.input_ids.tolist() == [[11, 12, 13, 14], [21, 22, 23, 9]]
    assert batch.labels.tolist() == [[-100, 13, 14, -100], [22, 23, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.segment_ids is None
    assert batch.loss_rows.tolist() == [1, 2, 4, 5]
    assert (batch.trained_tokens, batch.tokens) == (4, 7)


def test_packed() -> None:
    batch = collate([[B, A], [A]], max_length=8, pad_to=4, pad_id=9)
    assert batch.kind == "packed"
    assert batch.input_ids.tolist() == [[21, 22, 23, 11, 12, 13, 14, 9], [11, 12, 13, 14, 9, 9, 9, 9]]
    assert batch.labels.tolist() == [
        [22, 23, -100, -100, 13, 14, -100, -100],
        [-100, 13, 14, -100, -100, -100, -100, -100],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.segment_ids is not None
    assert batch.attention_mask is not None
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]]


def test_padding_with_the_stop_token_untrains_none() -> None:
    """pad == eos, as SmolLM2 has it: to mask padding by its id would take the stop token out of the labels, and the
    model would never stop. It is masked by position."""
    stop = 2
    ended = [example([*ids, stop], [1] * (len(ids) + 1)) for ids in ([11, 12, 13, 14], [21, 22])]
    batch = collate([[document] for document in ended], max_length=8, pad_to=8, pad_id=stop)
    assert batch.labels.tolist() == [[12, 13, 14, stop, *[IGNORE] * 4], [22, stop, *[IGNORE] * 6]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5]


def test_packed_rows_without_padding_need_no_attention_mask() -> None:
    batch = collate([[A, B], [B, A]], max_length=8)
    assert batch.kind == "packed"
    assert batch.attention_mask is None


def test_rows_of_one_document_are_not_packed() -> None:
    assert collate([[A], [B]], max_length=8).kind == "padded"
    assert collate([[B]], max_length=8).kind == "causal"


@pytest.mark.parametrize(
    ("pad_to", "max_length", "width"), [(1, 99, 4), (4, 99, 4), (3, 99, 6), (8, 99, 8), (8, 7, 7), (64, 4, 4)]
)
def test_width(pad_to: int, max_length: int, width: int) -> None:
    assert collate([[A], [B]], max_length=max_length, pad_to=pad_to).input_ids.shape == (2, width)


def test_a_document_that_ends_in_the_pad_token_trains_it() -> None:
    """SmolLM2's pad token is its EOS: masking by id would teach a model never to stop."""
    batch = collate([[example([5, 6, 2], [0, 1, 1])], [A]], max_length=8, pad_id=2)
    assert batch.labels[0].tolist() == [6, 2, -100, -100]
    assert batch.attention_mask is not None
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 0]


def test_a_row_longer_than_allowed_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        collate([[A, B]], max_length=6)


DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(0, 999), st.booleans()), min_size=2, max_size=6).map(
        lambda tokens: example([token for token, _ in tokens], [int(mark) for _, mark in tokens])
    ),
    min_size=1,
    max_size=4,
)


@given(st.lists(DOCUMENTS, min_size=1, max_size=3), st.integers(1, 9))
def test_every_trained_token_is_predicted_once_by_the_token_before_it(rows: list[list[Example]], pad_to: int) -> None:
    batch = collate(rows, max_length=24, pad_to=pad_to)
    got = []
    for index in batch.loss_rows:
        row, place = divmod(int(index), batch.labels.shape[1])
        got.append((row, int(batch.input_ids[row, place]), int(batch.labels[row, place])))
        if batch.segment_ids is not None:
            assert batch.segment_ids[row, place] == batch.segment_ids[row, place + 1] > 0
        assert batch.position_ids[row, place + 1] == batch.position_ids[row, place] + 1
    wanted = [
        (row, int(document.input_ids[place - 1]), int(document.input_ids[place]))
        for row, documents in enumerate(rows)
        for document in documents
        for place in range(1, len(document))
        if document.labels_mask[place]
    ]
    assert got == wanted
    assert batch.trained_tokens == sum(document.trained_tokens for documents in rows for document in documents)
    assert batch.tokens == sum(len(document) for documents in rows for document in documents)
    arrays = (batch.input_ids, batch.position_ids, batch.labels, batch.loss_rows)
    assert all(array.dtype == np.int64 and array.flags.c_contiguous for array in arrays)
