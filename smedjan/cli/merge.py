"""`smedjan merge BASE ADAPTER OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome


def merge(
    base: Annotated[str, Parameter(help="model directory that the adapter was trained on")],
    adapter: Annotated[Path, Parameter(help="adapter directory in PEFT's layout: a run of LoRA is one")],
    out: Annotated[Path, Parameter(help="directory to make")],
    /,
    *,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, Parameter(help="of the weights (default: as the base's)")
    ] = None,
    common: Common = COMMON,
) -> Outcome:
    """Add an adapter to the weights of its model. It is computed on the host, whatever the backend.

    Example: smedjan merge smollm2 run merged
    """
    from smedjan.api import merge as run

    made = run(base, adapter, out, dtype=dtype)
    text = f"{out}: {made.merged} modules merged, {made.dtype}, largest change {made.largest_change:.3g}"
    return Outcome(fields=vars(made), text=text)
