"""How far one form of a model is from another, on the same tokens: logits, distributions, choices, loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smedjan.checkpoint.dtype import to_float32
from smedjan.data.collate import collate
from smedjan.data.formats import Source, read_rows
from smedjan.data.mask import Example, tokenize_rows
from smedjan.hf.load import ModelFiles
from smedjan.hf.tokenizer import load_tokenizer
from smedjan.runtime.session import Session

POSITIONS = 1024
"""The most that are compared: logits of both models are kept, 4 bytes for each word of the vocabulary."""

PROMPTS = (
    "The forge was cold when she came in, and the first thing she did was to",
    "Water boils at a lower temperature on a mountain because the air there",
    "def mean(values):\n    return sum(values) / len(values)\n\n\ndef variance(values):\n",
    "Question: A train leaves at 9:40 and arrives at 11:15. How long does the journey take?\nAnswer:",
    "Dear Sir or Madam,\n\nI am writing to ask whether the room that I saw on Tuesday is still",
    '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "field":',
    "En gång för länge sedan bodde en smed vid randen av en stor skog, och varje morgon",
    "The three laws of thermodynamics, put briefly: first, energy is conserved; second,",
)
"""Prose, code, arithmetic, a letter, JSON, another language: where no rows are given."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`of` against `to`, over positions: |difference| of logits, KL(of || to) in nats, the share of positions whose
    likeliest token is the same, and both mean losses of the next token (with rows: of the trained ones)."""

    of: str
    to: str
    positions: int
    max_abs: float
    mean_abs: float
    kl_mean: float
    kl_max: float
    top1: float
    nll_of: float
    nll_to: float


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What `merge` wrote: modules that had an adapter, the largest change of a weight, and how far the model is from
    what it was made of (empty where nothing was compared)."""

    out: str
    dtype: str
    merged: int
    largest_change: float
    weights_sha256: str
    comparisons: tuple[Comparison, ...] = ()


def examples(files: ModelFiles, data: Path | None) -> list[Example]:
    """The rows of `data` (a folder's test split), cut to the model's context, or PROMPTS; POSITIONS tokens in all."""
    tokenizer, context = load_tokenizer(files.tokenizer_path), files.config.max_position_embeddings
    if data is not None:
        read = read_rows(data, "test")
        rows = list(tokenize_rows(read, tokenizer, max_length=context, too_long="truncate").examples)
    else:
        ids = [np.asarray(tokenizer.encode(text)[:context], dtype=np.int32) for text in PROMPTS]
        source = Source(file=Path("prompts"), line=1)
        rows = [Example(input_ids=row, labels_mask=np.ones(len(row), np.bool_), source=source) for row in ids]
    kept, left = [], POSITIONS
    for row in rows:
        if left < 2:
            break
        kept.append(Example(input_ids=row.input_ids[:left], labels_mask=row.labels_mask[:left], source=row.source))
        left -= len(kept[-1])
    return kept


def logits_of(session: Session, rows: Sequence[Example]) -> list[np.ndarray]:
    """float32 [T, V] of each row by itself: no padding, which would decide which kernels run."""
    found = []
    for row in rows:
        batch = collate([(row,)], max_length=len(row), pad_to=1)
        raw = session.backend.to_raw(session.logits(batch))
        found.append(to_float32(raw).reshape(len(row), raw.shape[-1]).copy())
    return found


def compare(
    of: str, to: str, before: Sequence[np.ndarray], after: Sequence[np.ndarray], rows: Sequence[Example]
) -> Comparison:
    largest, total, kl, same = 0.0, 0.0, [], []
    losses: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for one, other, row in zip(before, after, rows, strict=True):
        difference = np.abs(one.astype(np.float64) - other)
        largest, total = max(largest, float(difference.max())), total + float(difference.sum())
        p, q = _log_softmax(one), _log_softmax(other)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        same.append(one.argmax(-1) == other.argmax(-1))
        asked = np.flatnonzero(row.labels_mask[1:])
        for loss, log in zip(losses, (p, q), strict=True):
            loss.append(-log[asked, row.input_ids[1:][asked]])
    positions = sum(len(row) for row in rows)
    divergence = np.concatenate(kl)
    return Comparison(
        of=of,
        to=to,
        positions=positions,
        max_abs=largest,
        mean_abs=total / sum(part.size for part in before),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1=float(np.concatenate(same).mean()),
        nll_of=_mean(losses[0]),
        nll_to=_mean(losses[1]),
    )


def _mean(parts: Sequence[np.ndarray]) -> float:
    """Not a number where no position counts: the rows were cut before their answers."""
    values = np.concatenate(parts)
    return float(values.mean()) if values.size else float("nan")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
