"""`smedjan finetune`: its flags are those of FinetuneConfig, read from there so that they cannot differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from smedjan.cli.graph import summary
from smedjan.cli.output import COMMON, Common, Outcome, as_json, table
from smedjan.train.config import FinetuneConfig, flags
from smedjan.train.flags import Flag

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
    wanted = FinetuneConfig.from_toml(config, overrides)
    if wanted.dry_run:
        return _plan(wanted)
    from smedjan.train.finetune import finetune as run

    with _listener(wanted, common) as on_step:
        made = run(wanted, on_step=on_step, say=common.note)
    rows = ", ".join(f"{count} {what}" for what, count in made.rows.items())
    text = f"{made.run_dir}: {made.steps} steps on {made.backend}; rows {rows}; weights {made.weights_sha256[:16]}"
    if made.unstopped:
        text += f"\n{made.unstopped} rows train no stop token at their end: see smedjan data inspect"
    return Outcome(fields=vars(made), text=text)


def _plan(wanted: FinetuneConfig) -> Outcome:
    from smedjan.train.eight_bits import summary as errors_summary
    from smedjan.train.finetune import EIGHT_BITS
    from smedjan.train.plan import plan

    made = plan(wanted)
    rows = [(str(row["op"]), str(row["count"]), str(row["lowering"])) for row in made.ops]
    text = f"{table(('op', 'count', 'lowering'), rows)}\n{summary(vars(made))}"
    for way in EIGHT_BITS:
        if errors := getattr(made, way.key):
            text += f"\n{way.line(errors_summary(errors), on='inputs of a unit normal')}"
    return Outcome(fields=vars(made), text=text)


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
