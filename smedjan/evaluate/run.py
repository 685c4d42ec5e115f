"""`eval`: perplexity, choices and generated answers on held-out rows, each with its interval, alone or against another
model on the same rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from smedjan.checkpoint.atomic import write_atomic
from smedjan.data.formats import Row
from smedjan.errors import ConfigError
from smedjan.evaluate.rows import Choice, EvalRow, Question, asked, read_eval_rows
from smedjan.evaluate.score import Progress
from smedjan.evaluate.stats import Interval, bootstrap_ratio
from smedjan.evaluate.tasks import Decoding, Measured, choice, generated, generation, likelihood
from smedjan.hf.dataset_hub import data_path
from smedjan.hf.load import open_model, open_session, resolve
from smedjan.hf.peft import CONFIG as ADAPTER_CONFIG
from smedjan.hf.tokenizer import Tokenizer, load_tokenizer
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import Session

Task = Literal["auto", "perplexity", "choice", "generate"]
HEADLINES = ("exact_match", "accuracy")
"""The metrics of which `ci95` is the interval of the one that was measured."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """This model's metric minus the other's, on the same rows, and the paired bootstrap's interval of it."""

    difference: float
    ci95: tuple[float, float]
    other: float


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """A metric that was not measured is None. nll is per trained token, perplexity exp(nll); the others are shares of
    rows. `intervals` holds each one's 95 % percentile-bootstrap interval, rows resampled whole, and `ci95` that of
    exact_match or accuracy. `against` holds differences by metric, where another model was measured too."""

    n: int
    task: str
    nll: float | None = None
    perplexity: float | None = None
    exact_match: float | None = None
    normalised_match: float | None = None
    contains: float | None = None
    f1: float | None = None
    accuracy: float | None = None
    accuracy_bytes: float | None = None
    accuracy_tokens: float | None = None
    ci95: tuple[float, float] | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    against: dict[str, Difference] | None = None
    answers: tuple[str, ...] = ()
    backend: str = ""
    device: str = ""
    exact: bool = False
    plan_hash: str | None = None


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    task: Task = "auto",
    adapter: str | Path | None = None,
    against: str | Path | None = None,
    backend: str = "auto",
    limit: int | None = None,
    decoding: Decoding = Decoding(),  # noqa: B008  (frozen)
    predictions: str | Path | None = None,
    on_row: Progress | None = None,
) -> EvalReport:
    """The model in `path` on rows of `data` (a folder's test split), and `against`, a model or an adapter on the same
    base, on the same rows. `predictions` is a file to write, a JSON object a row."""
    if predictions is not None and not Path(predictions).parent.is_dir():
        raise ConfigError("its folder is missing", file=predictions, field="predictions", remedy="make the folder")
    base, laid = resolve(path, adapter)
    chat = load_tokenizer(open_model(base, laid).tokenizer_path).chat_template is not None
    rows = read_eval_rows(data_path(data, "test"), limit=limit, chat=chat)
    chosen = task_of(rows, task)
    made, session = _measured(base, laid, rows, chosen, backend, decoding, on_row)
    hashes, ran = [program.plan_hash for program in session.programs.values()], session.backend
    del session  # two models are never in memory together
    seed = decoding.sampling.seed
    differences = None
    if against is not None:
        other = resolve(base, against) if _is_adapter(against) else resolve(against, None)
        differences = compare(made, _measured(*other, rows, chosen, backend, decoding, on_row)[0], seed=seed)
    found = {name: bootstrap_ratio(*parts, seed=seed) for name, parts in made.metrics.items()}
    if predictions is not None:
        write_atomic(Path(predictions), _lines(rows, made.rows))
    headline = next((name for name in HEADLINES if name in found), None)
    nll = found.get("nll")
    return EvalReport(
        n=len(rows),
        task="+".join(chosen),
        perplexity=None if nll is None else math.exp(nll.estimate),
        ci95=None if headline is None else _ends(found[headline]),
        intervals={name: _ends(interval) for name, interval in found.items()}
        | ({} if nll is None else {"perplexity": (math.exp(nll.low), math.exp(nll.high))}),
        baselines=made.baselines,
        against=differences,
        answers=tuple(row["answer"] for row in made.rows) if "generate" in chosen else (),
        backend=ran.name,
        device=ran.device,
        exact=ran.exact,
        plan_hash=hashes[-1],
        **{name: interval.estimate for name, interval in found.items()},
    )


def task_of(rows: Sequence[EvalRow], task: Task) -> tuple[str, ...]:
    """What is measured on the rows, which are of one type. "auto": all that they allow, but for conversations, which
    are not answered unless asked."""
    assert task in get_args(Task), task
    first = rows[0]
    allowed: tuple[str, ...] = ("perplexity",)
    if isinstance(first, Choice):
        allowed = ("choice",)
    elif isinstance(first, Question):
        allowed = ("generate",)
    elif asked(first) is not None:
        allowed = ("perplexity", "generate")
    if task == "auto":
        return ("perplexity",) if isinstance(first, Row) and first.kind == "messages" else allowed
    if task not in allowed:
        raise ConfigError(
            f"{task} needs other rows than {first.source}",
            field="task",
            remedy=f"give --task {' or '.join(allowed)}, or rows as docs/cli.md has them for it",
        )
    return (task,)


def compare(ours: Measured, theirs: Measured, *, seed: int) -> dict[str, Difference]:
    """By metric. nll is left out where the models do not count the same tokens: it has no common unit then."""
    made = {}
    for name, (sums, counts) in ours.metrics.items():
        other_sums, other_counts = theirs.metrics[name]
        if counts != other_counts:
            continue
        gaps = [one - other for one, other in zip(sums, other_sums, strict=True)]
        gap = bootstrap_ratio(gaps, counts, seed=seed)
        other = sum(other_sums) / sum(other_counts)
        made[name] = Difference(difference=gap.estimate, ci95=_ends(gap), other=other)
    return made


def greedy_answers(
    session: Session, tokenizer: Tokenizer, rows: Sequence[Row], *, on_row: Progress | None = None
) -> list[str]:
    """The greedy continuation of each row's prompt, a few tokens longer than the completion at most."""
    return generated(session, tokenizer, rows, Decoding(), on_row=on_row)


def _measured(
    base: str | Path,
    adapter: Path | None,
    rows: Sequence[EvalRow],
    tasks: Sequence[str],
    backend: str,
    decoding: Decoding,
    on_row: Progress | None,
) -> tuple[Measured, Session]:
    files = open_model(base, adapter)
    tokenizer = load_tokenizer(files.tokenizer_path)
    session = open_session(files, select_backend(backend), adapter=adapter)
    made = Measured()
    if "perplexity" in tasks:
        likelihood(made, session, tokenizer, [row for row in rows if isinstance(row, Row)], on_row)
    if "choice" in tasks:
        choice(made, session, tokenizer, [row for row in rows if isinstance(row, Choice)], on_row)
    if "generate" in tasks:
        questions = [row for row in rows if not isinstance(row, Choice)]
        for row in questions:
            if asked(row) is None:
                raise row.source.error("does not end with an answer", "end it with an assistant message")
        generation(made, session, tokenizer, questions, decoding, on_row)
    return made, session


def _is_adapter(path: str | Path) -> bool:
    where = Path(path)
    return (where / ADAPTER_CONFIG).is_file() and not (where / "config.json").is_file()


def _ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def _lines(rows: Sequence[EvalRow], outcomes: Sequence[dict[str, Any]]) -> bytes:
    lines = []
    for row, outcome in zip(rows, outcomes, strict=True):
        where = {"file": str(row.source.file), row.source.unit: row.source.line}
        lines.append(json.dumps({**where, **outcome}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()
