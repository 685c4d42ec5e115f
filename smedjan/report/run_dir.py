"""`from_run`: what a run directory holds, as a RunReport.

Read from `RUN/smedjan/`, each as `--json` prints it:

    log.jsonl     one object a step {"step", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "tokens_per_s",
                  "peak_bytes", "mfu", "eta_s"}, one an evaluation {"step", "eval_loss"}; a row may hold both. Needed,
                  the rest is not. Before them {"step", "header"{}}, the last of which holds; with them
                  {"step", "samples"[{"prompt", "text"}]}
    run.json      {"title", "subtitle", "notes"[], "versions"{}, "backend", "device", "exact", "plan_hash",
                  "weights_sha256", "rows"{}, "trained_share", "config"{flags of finetune, nested}}
    eval.json     {"n", "nll", "perplexity", "exact_match", "ci95"[2], "name", "baselines"[{"name", "exact_match",
                  "ci95"}], "difference"{"over", "estimate", "ci95"}, "samples"[{"prompt", "expected", "answer"}]}
    bench.json    {"subject", "baseline", "what", "machine", "rounds"[[subject tokens/s, baseline tokens/s]]}
    parity.json   {"cases"[{"name", "attention", "dtype", "mode", "batch", "padding", "equal", "max_abs", "max_ulp",
                  "bound"}], "skipped"[{"name", "reason"}]}
    plan.json     {"ops"[{"op", "count", "lowering"}], "nodes", "flops_per_token", "planned_bytes"}

`backend`, `device`, `exact` and `plan_hash` are those of run.json, or of plan.json where it does not say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import nan
from os import PathLike
from pathlib import Path

from smedjan.errors import DataError
from smedjan.report.fields import Fields
from smedjan.report.model import (
    Bench,
    Difference,
    EvalPoint,
    Evaluation,
    Header,
    Lowering,
    Parity,
    ParityCase,
    Plan,
    RunReport,
    Sample,
    Score,
    Step,
    Words,
)


def from_run(run_dir: str | PathLike[str], *, live: bool = False) -> RunReport:
    """The report of a run directory. What is absent is left out; what is there and malformed is an error. A `live` run
    may be writing its last line."""
    run = Path(run_dir)
    folder = run / "smedjan"
    rows = list(log_rows(folder / "log.jsonl"))
    cut = None in rows
    logged = [row for row in rows if row is not None]
    steps, evals, words = _log(logged)
    head = next((found for row in reversed(logged) if (found := row.child("header"))), None)
    about = _read(folder / "run.json")
    evaluation, bench, parity, plan = (_read(folder / f"{name}.json") for name in ("eval", "bench", "parity", "plan"))
    notes = about.texts("notes") if about else ()
    if cut and not live:
        notes = (*notes, "The last line of the log is cut off: the run was stopped while writing it.")
    return RunReport(
        title=(about.text("title", "") if about else "") or run.resolve().name,
        subtitle=about.text("subtitle", "") if about else "",
        facts=_facts(about, plan, head, steps),
        versions=next(
            (tuple(source.flat("versions")) for source in (about, head) if source and source.has("versions")), ()
        ),
        steps=steps,
        evals=evals,
        header=_header(head) if head else None,
        words=words,
        bench=_bench(bench) if bench else None,
        evaluation=_evaluation(evaluation) if evaluation else None,
        parity=_parity(parity) if parity else None,
        plan=_plan(plan) if plan else None,
        notes=notes,
    )


def _log(rows: Sequence[Fields]) -> tuple[tuple[Step, ...], tuple[EvalPoint, ...], tuple[Words, ...]]:
    """Steps and evaluations in order. A run that was resumed logs some steps twice: the later row is what happened."""
    steps: dict[int, Step] = {}
    evals: dict[int, EvalPoint] = {}
    words: dict[tuple[int, int], Words] = {}
    for row in rows:
        if not ("loss" in row.data or "eval_loss" in row.data or row.has("samples")):
            continue
        step = row.integer("step")
        for number, sample in enumerate(row.rows("samples")):
            words[step, number] = Words(step=step, prompt=sample.text("prompt"), text=sample.text("text"))
        if "loss" in row.data:
            steps[step] = Step(
                step=step,
                loss=_number(row, "loss"),
                grad_norm=row.number_or_none("grad_norm"),
                lr=row.number_or_none("lr"),
                tokens=row.integer_or_none("tokens"),
                trained_tokens=row.integer_or_none("trained_tokens"),
                tokens_per_s=row.number_or_none("tokens_per_s"),
                peak_bytes=row.integer_or_none("peak_bytes"),
                mfu=row.number_or_none("mfu"),
                eta_s=row.number_or_none("eta_s"),
                skipped=row.integer_or_none("skipped"),
            )
        if "eval_loss" in row.data:
            evals[step] = EvalPoint(step=step, loss=_number(row, "eval_loss"))
    ordered = tuple(steps[step] for step in sorted(steps))
    return ordered, tuple(evals[step] for step in sorted(evals)), tuple(words[key] for key in sorted(words))


def _header(head: Fields) -> Header:
    """A part that an older or a newer version does not write counts as nothing."""
    rows, steps, optim, memory = (head.child(name) for name in ("rows", "steps", "optim", "memory"))
    return Header(
        total_steps=(steps and steps.integer_or_none("total")) or 0,
        clip=(optim and optim.number_or_none("clip")) or 0.0,
        kept=(rows and rows.integer_or_none("kept")) or 0,
        unstopped=(rows and rows.integer_or_none("unstopped")) or 0,
        trained_share=rows.share("trained_share") if rows and rows.has("trained_share") else 0.0,
        planned_bytes=memory.integer_or_none("planned_bytes") if memory else None,
        baseline_bytes=(memory and memory.integer_or_none("baseline_bytes")) or 0,
    )


def _number(row: Fields, key: str) -> float:
    """A log has null for a number that is not finite."""
    found = row.number_or_none(key)
    return nan if found is None else found


def log_rows(path: Path) -> Iterator[Fields | None]:
    """The log's rows, in order; None for a last line that a killed process left unfinished."""
    try:
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115  closed below, opened here for its error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            "no training log", file=path, remedy="give the --out directory of `smedjan finetune`"
        ) from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                if not line.endswith("\n"):
                    yield None
                    return
                raise DataError(str(error), file=path, field=f"line {number}", remedy="remove the line") from error
            yield Fields.of(value, path, f"line {number}")


def _read(path: Path) -> Fields | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    try:
        return Fields.of(json.loads(text), path, "")
    except json.JSONDecodeError as error:
        raise DataError(str(error), file=path, remedy="write it again, or delete it to leave it out") from error


def _facts(
    about: Fields | None, plan: Fields | None, head: Fields | None, steps: tuple[Step, ...]
) -> tuple[tuple[str, str], ...]:
    """Name and value of everything that identifies the run: its flags, or its header, then what came of them."""
    facts = [(name, value) for name, value in about.flat("config") if value] if about else []
    if head is not None and not facts:
        for key in ("model", "trained", "lora", "rows", "steps", "optim"):
            facts += [(f"{key}.{name}", value) for name, value in head.flat(key) if value]
        facts += [(key, head.shown(key)) for key in ("seed", "data", "started", "out") if head.has(key)]
    for key in ("backend", "device", "exact", "plan_hash", "config_hash", "weights_sha256", "trained_share"):
        value = next((source.shown(key) for source in (about, plan, head) if source and source.has(key)), "")
        if value:
            facts.append((key.replace("_", " "), value))
    facts += [(f"rows {name}", value) for name, value in about.flat("rows")] if about else []
    tokens = sum(step.tokens or 0 for step in steps)
    if tokens:
        facts.append(("tokens read", f"{tokens:,}"))
        facts.append(("tokens trained", f"{sum(step.trained_tokens or 0 for step in steps):,}"))
    return tuple(facts)


def _evaluation(data: Fields) -> Evaluation:
    scores: list[Score] = []
    if data.number_or_none("exact_match") is not None:
        name = data.text("name", "this model")
        scores.append(Score(name=name, share=data.share("exact_match"), interval=data.interval("ci95"), ours=True))
    for row in data.rows("baselines"):
        scores.append(Score(name=row.text("name"), share=row.share("exact_match"), interval=row.interval("ci95")))
    difference = None
    gap = data.child("difference")
    if gap:
        interval = gap.interval("ci95")
        if interval is None:
            raise gap.error("ci95", "is missing")
        difference = Difference(over=gap.text("over"), estimate=gap.number("estimate"), interval=interval)
    return Evaluation(
        n=data.integer("n"),
        scores=tuple(scores),
        difference=difference,
        nll=data.number_or_none("nll"),
        perplexity=data.number_or_none("perplexity"),
        samples=tuple(
            Sample(prompt=row.text("prompt"), expected=row.text("expected"), answer=row.text("answer"))
            for row in data.rows("samples")
        ),
    )


def _bench(data: Fields) -> Bench:
    rounds = data.pairs("rounds")
    if any(not (ours > 0 and theirs > 0) for ours, theirs in rounds):
        raise data.error("rounds", "holds a speed that is not above zero")
    return Bench(
        subject=data.text("subject"),
        baseline=data.text("baseline"),
        what=data.text("what", "Training"),
        machine=data.text("machine", ""),
        rounds=rounds,
    )


def _parity(data: Fields) -> Parity:
    cases = tuple(
        ParityCase(
            name=row.text("name"),
            attention=row.text("attention", ""),
            dtype=row.text("dtype", ""),
            mode=row.text("mode", ""),
            batch=row.shown("batch"),
            padding=row.shown("padding"),
            equal=row.boolean("equal"),
            max_abs=row.number("max_abs"),
            max_ulp=row.number_or_none("max_ulp"),
            error=row.number_or_none("error"),
            bound=row.number_or_none("bound"),
        )
        for row in data.rows("cases")
    )
    skipped = tuple((row.text("name"), row.text("reason")) for row in data.rows("skipped"))
    about = ", ".join(
        f"{key.replace('_', ' ')} {data.shown(key)}" for key in ("backend", "plan_hash") if data.shown(key)
    )
    return Parity(cases=cases, skipped=skipped, about=about)


def _plan(data: Fields) -> Plan:
    ops = tuple(
        Lowering(op=row.text("op"), count=row.integer("count"), lowering=row.text("lowering"))
        for row in data.rows("ops")
    )
    return Plan(
        ops=ops,
        nodes=data.integer_or_none("nodes"),
        flops_per_token=data.number_or_none("flops_per_token"),
        planned_bytes=data.integer_or_none("planned_bytes"),
    )
