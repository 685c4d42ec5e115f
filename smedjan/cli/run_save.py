"""`smedjan run save DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome
from smedjan.errors import ConfigError


def save(
    run: Annotated[Path, Parameter(help="run directory: the --out of a smedjan finetune that is running")],
    /,
    *,
    timeout: Annotated[float, Parameter(help="most seconds to wait for the end of its step")] = 600.0,
    common: Common = COMMON,
) -> Outcome:
    """Ask a run for a checkpoint now, and wait until it is there. The run goes on as if nobody had asked.

    Example: smedjan run save run
    """
    from smedjan.checkpoint.lock import ask_checkpoint

    if not run.is_dir():
        raise ConfigError("is no directory", file=run, remedy="give the --out of smedjan finetune")
    if timeout <= 0:
        raise ConfigError(f"is {timeout:g}", field="timeout", remedy="give more than 0 seconds")
    made = ask_checkpoint(run, timeout=timeout)
    return Outcome(fields=vars(made), text=f"{made.checkpoint}: step {made.step} of process {made.pid}")
