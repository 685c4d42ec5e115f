"""`eval`: loss and perplexity of the trained tokens, and exact match of greedy answers, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from smedjan.data.dataset import TokenDataset
from smedjan.data.formats import Row, read_rows
from smedjan.data.mask import tokenize_rows
from smedjan.evaluate.stats import bootstrap_mean
from smedjan.generate.loop import generate
from smedjan.hf.load import open_model, open_session, resolve
from smedjan.hf.tokenizer import Tokenizer, load_tokenizer
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import Session
from smedjan.train.finetune import evaluate_loss

BATCH = 8
SPARE = 4
"""New tokens allowed beyond the expected answer's, so that an answer that runs on is seen to be wrong."""


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
    on_row: Callable[[int, int], None] | None = None,
) -> EvalReport:
    """The model in `path` on rows of `data` (a folder's test split). `on_row(done, all)` reports progress."""
    base, laid = resolve(path, adapter)
    files = open_model(base)
    tokenizer = load_tokenizer(files.path)
    session = open_session(files, select_backend(backend), adapter=laid)
    rows = read_rows(data, "test")[:limit]
    context = files.config.max_position_embeddings
    tokenized = tokenize_rows(rows, tokenizer, max_length=context)
    nll = evaluate_loss(session, TokenDataset(tokenized.examples), batch_size=BATCH, max_length=context)
    answers = []
    if all(row.completion for row in rows):
        for number, row in enumerate(rows):
            answers.append(answer(session, tokenizer, row))
            if on_row is not None:
                on_row(number + 1, len(rows))
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


def answer(session: Session, tokenizer: Tokenizer, row: Row) -> str:
    """The greedy continuation of the row's prompt, up to a stop token or a few tokens past the expected length."""
    prompt = tokenizer.encode(row.prompt, add_special_tokens=True)
    room = len(tokenizer.encode(row.completion, add_special_tokens=False)) + SPARE
    stop = frozenset((*tokenizer.eos_token_ids, *session.config.eos_token_id))
    made = [t for t in generate(session, prompt, max_new_tokens=room, stop=stop) if t not in stop]
    return tokenizer.decode(made)
