"""`smedjan eval DIR --data FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome


def evaluate(
    model: Annotated[str, Parameter(help="model directory, run directory or hub id")],
    /,
    *,
    data: Annotated[Path, Parameter(help="rows to evaluate on")],
    adapter: Annotated[Path | None, Parameter(help="adapter directory in PEFT's layout")] = None,
    limit: Annotated[int | None, Parameter(help="most rows")] = None,
    common: Common = COMMON,
) -> Outcome:
    """Loss, perplexity and exact match on held-out rows.

    Example: smedjan eval run --data held-out.jsonl
    """
    from smedjan.api import evaluate as run

    report = run(model, data, adapter=adapter, backend=common.backend, limit=limit)
    lines = [f"rows         {report.n}", f"nll          {report.nll:.4f}", f"perplexity   {report.perplexity:.3f}"]
    if report.exact_match is not None:
        lines.append(f"exact match  {report.exact_match:.1%}")
    if report.ci95 is not None:
        low, high = report.ci95
        lines.append(f"             {low:.1%} to {high:.1%} (95 %)")
    return Outcome(fields=vars(report), text="\n".join(lines))
