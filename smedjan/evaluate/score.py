"""Log-likelihoods of given tokens: sum over the trained places t of log softmax(logits[t])[token t + 1].

Logits come from the backend in the model's dtype; the softmax is taken of them in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smedjan.checkpoint.dtype import to_float32
from smedjan.data.collate import collate
from smedjan.data.formats import Source
from smedjan.data.mask import Example
from smedjan.generate.batch import LOGITS, grouped
from smedjan.generate.loop import CAPACITY_STEP
from smedjan.runtime.session import Cache, Session
from smedjan.train.evaluation import PAD_TO

BATCH = 8
SHARED = 48
"""Tokens of prompt that must be spared before a prompt is computed once for all of its continuations."""
_ROWS = 64
"""Rows of logits that are widened to float64 at a time."""

Progress = Callable[[int, int], None]
"""Called with (rows done, all rows)."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of a continuation: its log-likelihood, and whether each of its tokens was the likeliest."""

    logprob: float
    tokens: int
    greedy: bool


def score_examples(
    session: Session, examples: Sequence[Example], *, batch_size: int = BATCH, on_row: Progress | None = None
) -> list[Score]:
    """Each example's trained tokens."""
    config = session.config
    scores: list[Score | None] = [None] * len(examples)
    done = 0
    for group in grouped(list(map(len, examples)), batch_size=batch_size, tokens=LOGITS // config.vocab_size):
        batch = collate(
            [(examples[index],) for index in group], max_length=config.max_position_embeddings, pad_to=PAD_TO
        )
        labels = batch.labels.reshape(-1)[batch.loss_rows]
        logprobs, likeliest = _picked(session.trained_logits(batch), labels)
        row_of = batch.loss_rows // batch.input_ids.shape[1]
        for row, index in enumerate(group):
            scores[index] = _score(logprobs[row_of == row], likeliest[row_of == row])
        done += len(group)
        if on_row is not None:
            on_row(done, len(examples))
    return [score for score in scores if score is not None]


def example_losses(
    session: Session, examples: Sequence[Example], *, batch_size: int = BATCH, on_row: Progress | None = None
) -> list[float]:
    """The negative log-likelihood of each example, summed over its trained tokens.

    An example whose logits are too many for the host goes through the training step's loss, which a fast backend takes
    chunk by chunk: an evaluation needs no more memory than training.
    """
    most = LOGITS // session.config.vocab_size
    short = [index for index, example in enumerate(examples) if len(example) <= most]
    losses = [0.0] * len(examples)

    def counted(done: int, _: int) -> None:
        if on_row is not None:
            on_row(done, len(examples))

    found = score_examples(session, [examples[i] for i in short], batch_size=batch_size, on_row=counted)
    for index, score in zip(short, found, strict=True):
        losses[index] = -score.logprob
    for number, index in enumerate(sorted(set(range(len(examples))) - set(short)), start=1):
        batch = collate([(examples[index],)], max_length=session.config.max_position_embeddings, pad_to=PAD_TO)
        loss, _ = session.micro(batch, (), num_items=1.0)
        losses[index] = float(to_float32(session.backend.to_raw(loss))[0])
        counted(len(short) + number, len(examples))
    return losses


def score_pairs(
    session: Session,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = BATCH,
    on_row: Progress | None = None,
) -> list[Score]:
    """Each continuation, given its context. Both have a token at least; together they may be one more than the model
    has places for, since the last one is predicted and not read.

    A context that several continuations follow is computed once, over a cache, where that spares enough.
    """
    together: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs):
        together.setdefault(tuple(context), []).append(index)
    scores: dict[int, Score] = {}
    apart: list[int] = []
    for given, indices in together.items():
        continuations = [pairs[index][1] for index in indices]
        if len(given) + max(map(len, continuations)) > session.config.max_position_embeddings:
            scores.update({index: _score_full(session, given, pairs[index][1]) for index in indices})
            continue
        if len(given) * (len(indices) - 1) < SHARED or not _cacheable(session, given, continuations):
            apart.extend(indices)
            continue
        scores.update(zip(indices, _score_shared(session, given, continuations), strict=True))
        if on_row is not None:
            on_row(len(scores), len(pairs))
    shared = len(scores)

    def counted(done: int, _: int) -> None:
        if on_row is not None:
            on_row(shared + done, len(pairs))

    examples = [_example(*pairs[index]) for index in apart]
    scores.update(zip(apart, score_examples(session, examples, batch_size=batch_size, on_row=counted), strict=True))
    return [scores[index] for index in range(len(pairs))]


def _example(context: Sequence[int], continuation: Sequence[int]) -> Example:
    # What is never reported needs no place in a file.
    source = Source(file=Path(), line=0)
    trained = np.arange(len(context) + len(continuation)) >= len(context)
    return Example(input_ids=np.array([*context, *continuation], dtype=np.int32), labels_mask=trained, source=source)


def _cacheable(session: Session, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> bool:
    """A rope that changes its frequencies with the length cannot go on from what is cached."""
    restart = session.config.restart_after
    return restart is None or _block(len(context)) + _block(max(map(len, continuations))) <= restart


def _score_shared(session: Session, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
    """The context but its last token once, then that token and each continuation over the cache, which is rewound.

    Blocks are padded to powers of two, so that few programs are built: what stands behind a token does not change it,
    and the next block overwrites it.
    """
    start = len(context) - 1
    capacity = _block(start) + _block(max(map(len, continuations)))
    cache = Cache(session, batch=1, capacity=-(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
    if start:
        _feed(cache, context[:-1], last=True)
    scores = []
    for tokens in continuations:
        cache.length = start
        raw = session.backend.to_raw(_feed(cache, [context[-1], *tokens[:-1]]))
        logits = to_float32(raw).reshape(-1, raw.shape[-1])[: len(tokens)]
        scores.append(_score(*_picked(logits, np.asarray(tokens, dtype=np.int64))))
    return scores


def _score_full(session: Session, context: Sequence[int], continuation: Sequence[int]) -> Score:
    """All but the last token as one block over an empty cache, which fills the context at most."""
    tokens = [*context, *continuation[:-1]]
    cache = Cache(session, batch=1, capacity=-(-len(tokens) // CAPACITY_STEP) * CAPACITY_STEP)
    raw = session.backend.to_raw(cache.feed(np.asarray([tokens])))
    logits = to_float32(raw).reshape(-1, raw.shape[-1])[len(context) - 1 :]
    return _score(*_picked(logits, np.asarray(continuation, dtype=np.int64)))


def _feed(cache: Cache, tokens: Sequence[int], *, last: bool = False):
    ids = np.zeros((1, _block(len(tokens))), dtype=np.int64)
    ids[0, : len(tokens)] = tokens
    places = cache.length + np.arange(ids.shape[1])[None]
    return cache.feed(ids, None, places.clip(max=cache.session.config.max_position_embeddings - 1), last=last)


def _block(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _picked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities float64 [R] of the labels, whether each is the likeliest)       logits [R, V], labels [R]"""
    found, likeliest = np.empty(len(labels)), np.empty(len(labels), dtype=bool)
    for start in range(0, len(labels), _ROWS):
        rows, wanted = logits[start : start + _ROWS].astype(np.float64), labels[start : start + _ROWS]
        top = rows.max(-1)
        picked = rows[np.arange(len(wanted)), wanted]
        found[start : start + _ROWS] = picked - top - np.log(np.exp(rows - top[:, None]).sum(-1))
        likeliest[start : start + _ROWS] = rows.argmax(-1) == wanted
    return found, likeliest


def _score(logprobs: np.ndarray, likeliest: np.ndarray) -> Score:
    return Score(logprob=float(logprobs.sum()), tokens=len(logprobs), greedy=bool(likeliest.all()))
