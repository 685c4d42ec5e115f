"""`smedjan merge BASE ADAPTER OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome, table
from smedjan.errors import ConfigError

if TYPE_CHECKING:
    from smedjan.evaluate.fidelity import Comparison


def merge(
    base: Annotated[str, Parameter(help="model directory that the adapter was trained on")],
    adapter: Annotated[Path, Parameter(help="adapter directory of PEFT's or mlx-lm's: a run of LoRA is one")],
    out: Annotated[Path, Parameter(help="directory to make")],
    /,
    *,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, Parameter(help="of the weights (default: as the base's)")
    ] = None,
    onto: Annotated[
        Literal["stored", "trained"],
        Parameter(help="the model as it is stored, or what 4 or 8 bits left of it, on which qlora trained"),
    ] = "stored",
    storage: Annotated[
        Literal["nf4", "int8"] | None, Parameter(help="what it was trained on, for an adapter that does not say")
    ] = None,
    check: Annotated[
        bool, Parameter(help="run the adapter beside its base and the merged model on the same rows, and compare")
    ] = True,
    data: Annotated[Path | None, Parameter(help="rows to compare on (default: a few prompts)")] = None,
    common: Common = COMMON,
) -> Outcome:
    """Add an adapter to the weights of its model, on the host, and show how far the logits move.

    Example: smedjan merge smollm2 run merged
    """
    from smedjan.api import merge as run

    if data is not None and not check:
        raise ConfigError("is compared on only with --check", field="data", remedy="leave out --no-check")
    made = run(
        base,
        adapter,
        out,
        dtype=dtype,
        onto=onto,
        storage=storage,
        check=check,
        data=data,
        backend=common.backend,
    )
    lines = [f"{out}: {made.merged} modules merged, {made.dtype}, largest change {made.largest_change:.3g}"]
    if made.comparisons:
        lines.append(table(HEAD, [_row(each) for each in made.comparisons]))
    elif check:
        lines.append("not compared: the model has no tokenizer.json")
    if onto == "stored" and any(each.of != BESIDE for each in made.comparisons):
        lines.append("The adapter was trained on fewer bits; --onto trained merges it into what it was trained on.")
    return Outcome(fields=vars(made), text="\n".join(lines))


HEAD = ("against merged", "positions", "max |d|", "mean |d|", "KL mean", "KL max", "top-1", "nll", "nll merged")
"""d: difference of logits; KL in nats, of the adapter beside its base from the merged model."""

BESIDE = "adapter beside base"


def _row(found: Comparison) -> tuple[str, ...]:
    numbers = (found.max_abs, found.mean_abs, found.kl_mean, found.kl_max)
    return (
        found.of,
        str(found.positions),
        *(f"{number:.2e}" for number in numbers),
        f"{found.top1:.1%}",
        f"{found.nll_of:.4f}",
        f"{found.nll_to:.4f}",
    )
