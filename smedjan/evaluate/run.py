"""`eval`: loss and perplexity of the trained tokens, and exact match of greedy answers, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smedjan.data.collate import collate
from smedjan.data.dataset import TokenDataset
from smedjan.data.formats import Row, read_rows
from smedjan.data.mask import Example, tokenize_rows
from smedjan.evaluate.stats import bootstrap_mean
from smedjan.generate.loop import generate
from smedjan.hf.load import open_model, open_session, resolve
from smedjan.hf.tokenizer import Tokenizer, load_tokenizer
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import Session
from smedjan.train.evaluation import PAD_TO, evaluate_loss

BATCH = 8
SPARE = 4
"""New tokens allowed beyond the expected answer's, so that an answer that runs on is seen to be wrong."""

Progress = Callable[[int, int], None]
"""Called with (rows done, all rows)."""


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """nll and perplexity are per trained token; exact_match (with its 95 % interval) where rows have a completion."""

    n: int
    nll: float
    perplexity: float
    exact_match: float | None
    ci95: tuple[float, float] | None
    baselines: dict[str, float] = field(default_factory=dict)
    answers: tuple[str, ...] = ()


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    adapter: str | Path | None = None,
    backend: str = "auto",
    limit: int | None = None,
    on_row: Progress | None = None,
) -> EvalReport:
    """The model in `path` on rows of `data` (a folder's test split)."""
    base, laid = resolve(path, adapter)
    files = open_model(base)
    tokenizer = load_tokenizer(files.path)
    session = open_session(files, select_backend(backend), adapter=laid)
    rows = read_rows(data, "test")[:limit]
    context = files.config.max_position_embeddings
    tokenized = tokenize_rows(rows, tokenizer, max_length=context)
    nll = evaluate_loss(session, TokenDataset(tokenized.examples), batch_size=BATCH, max_length=context)
    answers = greedy_answers(session, tokenizer, rows, on_row=on_row) if all(row.completion for row in rows) else []
    hits = [float(got.strip() == row.completion.strip()) for got, row in zip(answers, rows, strict=False)]
    interval = bootstrap_mean(hits, seed=0) if hits else None
    return EvalReport(
        n=len(rows),
        nll=nll,
        perplexity=math.exp(nll),
        exact_match=sum(hits) / len(hits) if hits else None,
        ci95=None if interval is None else (interval.low, interval.high),
        answers=tuple(answers),
    )


def greedy_answers(
    session: Session, tokenizer: Tokenizer, rows: Sequence[Row], *, on_row: Progress | None = None
) -> list[str]:
    """The greedy continuation of each row's prompt.

    Where the likeliest token at every place of the expected completion, its stop token included, is the expected one,
    greedy decoding gives the completion: one pass over a batch finds that out. Only the other rows are decoded.
    """
    context = session.config.max_position_embeddings
    examples = tokenize_rows(rows, tokenizer, max_length=context).examples
    order = sorted(range(len(rows)), key=lambda index: -len(examples[index]))
    answers: list[str | None] = [None] * len(rows)
    done = 0
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        for index, right in zip(chosen, _foretold(session, [examples[i] for i in chosen], context), strict=True):
            answers[index] = rows[index].completion if right else _decode(session, tokenizer, rows[index])
            done += 1
            if on_row is not None:
                on_row(done, len(rows))
    return [answer for answer in answers if answer is not None]


def _foretold(session: Session, examples: Sequence[Example], context: int) -> list[bool]:
    """For each example: is every trained token the likeliest one?"""
    batch = collate([(example,) for example in examples], max_length=context, pad_to=PAD_TO)
    hit = session.predictions(batch) == batch.labels.reshape(-1)[batch.loss_rows]
    row_of = batch.loss_rows // batch.input_ids.shape[1]
    return [bool(np.all(hit[row_of == row])) for row in range(len(examples))]


def _decode(session: Session, tokenizer: Tokenizer, row: Row) -> str:
    """Token by token, up to a stop token or a few tokens past the expected length."""
    prompt = tokenizer.encode(row.prompt, add_special_tokens=True)
    room = len(tokenizer.encode(row.completion, add_special_tokens=False)) + SPARE
    stop = frozenset((*tokenizer.eos_token_ids, *session.config.eos_token_id))
    made = [t for t in generate(session, prompt, max_new_tokens=room, stop=stop) if t not in stop]
    return tokenizer.decode(made)
