"""`smedjan export SRC OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome

FileType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"]


def export_gguf(
    source: Annotated[str, Parameter(help="model directory or hub id (org/name[@revision])")],
    out: Annotated[Path, Parameter(help=".gguf file to make; a Modelfile for ollama is made beside it")],
    /,
    *,
    type: Annotated[FileType, Parameter(help="how weights are stored")] = "Q4_K_M",
    ignore_key: Annotated[
        tuple[str, ...],
        Parameter(negative=(), show_default=False, help="key of config.json to let pass; may be given again"),
    ] = (),
    common: Common = COMMON,
) -> Outcome:
    """Make a GGUF file, for llama.cpp and what is built on it, of a model directory.

    Example: smedjan export smollm2 smollm2.gguf --type Q8_0
    """
    from smedjan.hf.export_gguf import export_gguf as run

    made = run(source, out, type=type, ignore_keys=ignore_key, say=common.note)
    for line in made.notes:
        common.note(line)
    stored = ", ".join(f"{count} {kind}" for kind, count in sorted(made.types.items()))
    size = f"{made.bytes / 1e6:,.1f} MB"
    text = f"{out}: {made.architecture}, {made.parameters:,} parameters, {made.type}, {size} ({stored})"
    return Outcome(fields=vars(made), text=text)
