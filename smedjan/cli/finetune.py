"""`smedjan finetune`: its flags are those of FinetuneConfig, read from there so that they cannot differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from smedjan.checkpoint.sizes import format_size
from smedjan.cli.output import COMMON, Common, Outcome, as_json, table
from smedjan.report.scale import duration
from smedjan.train.config import FinetuneConfig, flags
from smedjan.train.flags import Flag
from smedjan.train.kept import configured

if TYPE_CHECKING:
    from smedjan.train.macs import Mac
    from smedjan.train.plan import Plan

Event = dict[str, Any]


def finetune(
    *,
    config: Annotated[Path | None, Parameter(help="TOML file with the same keys; flags win")] = None,
    common: Common = COMMON,
    **given: object,
) -> Outcome:
    """Fine-tune a model on your rows, all of it or by LoRA. Ctrl-C stops after the step, with a checkpoint.

    Example: smedjan finetune --model smollm2 --data rows.jsonl --out run --train.steps 100
    """
    typed = {name.replace("__", "."): value for name, value in given.items()}
    # Left out where it was not given, so that the file's own backend stands
    overrides = typed if common.backend == "auto" else {**typed, "backend": common.backend}
    wanted = configured(config, overrides)
    if wanted.dry_run:
        return _plan(wanted, common)
    from smedjan.train.finetune import finetune as run

    with _listener(wanted, common) as on_step:
        made = run(wanted, on_step=on_step, say=common.note)
    rows, sha256 = _counted(made.rows), made.weights_sha256[:16]
    text = f"{made.run_dir}: {made.steps} steps on {made.backend}; rows {rows}; weights {sha256}"
    if made.unstopped:
        text += f"\n{made.unstopped} rows train no stop token at their end: see smedjan data inspect"
    return Outcome(fields=vars(made), text=text)


def _plan(wanted: FinetuneConfig, common: Common) -> Outcome:
    from smedjan.train.eight_bits import summary
    from smedjan.train.parts import EIGHT_BITS
    from smedjan.train.plan import plan

    made = plan(wanted, say=common.note)
    lines = [f"{name:<10} {text}" for name, text in _lines(made)]
    head: tuple[str, ...] = ("op", "count", "lowering")
    rows: list[tuple[str, ...]] = [(row["op"], f"{row['count']}", row["lowering"]) for row in made.ops]
    if made.step_seconds is not None:
        head = (*head, "ms")
        rows = [(*row, f"{1e3 * op['seconds']:.1f}") for row, op in zip(rows, made.ops, strict=True)]
    for way in EIGHT_BITS:
        if errors := getattr(made, way.key):
            lines.append(way.line(summary(errors), on="inputs of a unit normal"))
    return Outcome(fields=vars(made), text="\n".join(lines) + f"\n\n{table(head, rows)}")


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """(name, what a person reads) of a plan."""
    batch, share = plan.batch, plan.trained_parameters / plan.parameters
    yield "model", f"{plan.parameters:,} parameters; {plan.trained_parameters:,} trained ({share:.2%})"
    yield "rows", ", ".join(f"{count:,} {what}" for what, count in plan.rows.items() if count)
    accumulated = f" x {batch['grad_accum']}" if batch["grad_accum"] > 1 else ""
    yield "steps", f"{plan.steps:,} of {batch['rows']}{accumulated} rows, of {batch['tokens']:,} tokens at most"
    exact = "exact" if plan.exact else "fast"
    yield (
        "runs on",
        f"{plan.backend} ({exact}), plan {plan.plan_hash}: {plan.nodes:,} nodes, "
        f"{plan.flops_per_token / 1e6:,.1f} MFLOP a token",
    )
    memory = f"{format_size(plan.planned_bytes)} planned"
    if plan.memory_available is not None:
        memory += f", {format_size(plan.memory_available)} available"
    yield "memory", memory + {True: ": fits", False: ": does not fit", None: ""}[plan.fits]
    if plan.fits is False:
        yield "would fit", plan.advice or "nothing that these flags can change"
    if plan.macs:
        yield "Macs", _macs(plan.macs)
    if plan.longest_row is not None:
        longest = f"rows of up to {plan.longest_row:,} tokens fit" if plan.longest_row else "no row fits"
        yield "longest", longest
    if plan.step_seconds is not None:
        tokens = batch["rows"] * batch["tokens"] * batch["grad_accum"] / plan.step_seconds
        whole = duration(plan.step_seconds * plan.steps)
        yield "time", f"{plan.step_seconds:.3g} s a step ({tokens:,.0f} tokens/s), at most {whole} in all"


def _macs(found: Sequence[Mac]) -> str:
    holding, small = ([f"{mac.gigabytes}" for mac in found if mac.fits is fits] for fits in (True, False))
    if not small:
        return f"fits into one of {holding[0]} GB or more"
    largest = next(mac for mac in reversed(found) if not mac.fits)
    says = f"not into one of {small[-1]} GB, whose GPU has {format_size(largest.working_set_bytes)}"
    return f"fits into one of {holding[0]} GB or more, {says}" if holding else says


def _counted(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in rows.items())


def _listener(wanted: FinetuneConfig, common: Common) -> Any:
    """A context that gives what is called on every event of a run."""
    if common.json:
        return nullcontext(lambda event: print(as_json(event), flush=True))
    if common.quiet:
        return nullcontext(None)
    from smedjan.cli.progress import Bar

    return Bar(wanted.train.steps)


def _annotation(flag: Flag, name: str) -> Any:
    # What is on by default is turned off by a value: `--optim.master false`
    choices = ("true", "false") if flag.type is bool and flag.default else flag.choices
    kind: Any = Literal[choices] if choices else bool if flag.type is bool else str
    shown = "" if flag.default is None or kind is bool else f" (default {_shown(flag.default)})"
    help_text = f"{flag.help}{' (required)' if flag.required else shown}"
    return Annotated[kind | None, Parameter(name=f"--{name}", negative=(), help=help_text)]


def _shown(default: object) -> str:
    return ",".join(default) if isinstance(default, tuple) else f"{default}"


def _signature() -> inspect.Signature:
    """Values stay as typed: FinetuneConfig alone says what is a number and what is in range."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    made = [
        inspect.Parameter(
            name.replace(".", "__").replace("-", "_"), keyword, default=None, annotation=_annotation(flag, name)
        )
        for name, flag in flags().items()
        if name != "backend"
    ]
    own = inspect.signature(finetune, eval_str=True)
    ours = [parameter for name, parameter in own.parameters.items() if name != "given"]
    return own.replace(parameters=[*ours[:1], *made, *ours[1:]])


_typed: Callable[..., Outcome] = finetune
_typed.__signature__ = _signature()  # type: ignore[attr-defined]
