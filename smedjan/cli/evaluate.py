"""`smedjan eval DIR --data FILE`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome, table
from smedjan.cli.sampling import KNOBS, Knobs
from smedjan.errors import ConfigError

if TYPE_CHECKING:
    from smedjan.evaluate.run import EvalReport

SHARES = ("accuracy", "accuracy_bytes", "accuracy_tokens", "exact_match", "normalised_match", "contains", "f1")
METRICS = ("nll", "perplexity", *SHARES)


def evaluate(
    model: Annotated[str, Parameter(help="model directory, run directory or hub id")],
    /,
    *,
    data: Annotated[Path, Parameter(help="rows to evaluate on")],
    task: Annotated[
        Literal["auto", "perplexity", "choice", "generate"],
        Parameter(help="what to measure (auto: what the rows allow; conversations are answered only when asked)"),
    ] = "auto",
    adapter: Annotated[Path | None, Parameter(help="adapter directory of PEFT's or mlx-lm's")] = None,
    against: Annotated[
        Path | None, Parameter(help="another model, or an adapter on the same one: differences on the same rows")
    ] = None,
    limit: Annotated[int | None, Parameter(help="most rows")] = None,
    predictions: Annotated[Path | None, Parameter(help="file to write, a JSON object for each row")] = None,
    batch_size: Annotated[int, Parameter(help="answers generated together")] = 32,
    knobs: Knobs = KNOBS,
    common: Common = COMMON,
) -> Outcome:
    """Perplexity, choices and generated answers on held-out rows, each with its 95 % interval.

    An answer may be as long as the expected one and 4 tokens more.

    Example: smedjan eval run --data held-out.jsonl
    """
    from smedjan.api import evaluate as run
    from smedjan.evaluate.tasks import Decoding

    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"is {value}", field=name, remedy="give 1 or more")
    decoding = Decoding(
        sampling=knobs.sampling(), max_new_tokens=knobs.max_new_tokens, stop=knobs.stop, batch_size=batch_size
    )
    with _progress(common.quiet) as on_row:
        report = run(
            model,
            data,
            task=task,
            adapter=adapter,
            against=against,
            backend=common.backend,
            limit=limit,
            decoding=decoding,
            predictions=predictions,
            on_row=on_row,
        )
    return Outcome(fields=vars(report), text=shown(report))


def shown(report: EvalReport) -> str:
    """A line for each metric, its interval behind it."""
    lines = [("rows", str(report.n), "", "")]
    for name in METRICS:
        value = getattr(report, name)
        if value is None:
            continue
        low, high = report.intervals[name]
        line = (name.replace("_", " "), _figure(name, value), f"{_figure(name, low)} to {_figure(name, high)}")
        other = (report.against or {}).get(name)
        gap = ""
        if other is not None:
            ends = " to ".join(_figure(name, end, "+") for end in other.ci95)
            gap = f"{_figure(name, other.difference, '+')} ({ends}) from {_figure(name, other.other)}"
        lines.append((*line, gap))
    lines += [(f"baseline: {name}", f"{value:.1%}", "", "") for name, value in report.baselines.items()]
    return table(("", "", "95 % interval", "against" if report.against is not None else ""), lines)


def _figure(name: str, value: float, sign: str = "") -> str:
    if name in SHARES:
        return f"{value:{sign}.1%}"
    return f"{value:{sign}.{4 if name == 'nll' else 3}f}"


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of rows on stderr, where someone looks at it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("rows"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)
