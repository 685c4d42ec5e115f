"""`smedjan export SRC OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome
from smedjan.errors import ConfigError

FileType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"]


def export(
    source: Annotated[str, Parameter(help="model directory or hub id (org/name[@revision]); an adapter directory")],
    out: Annotated[
        Path,
        Parameter(help=".gguf file to make, with a Modelfile for ollama beside it; with --format mlx-lm, a directory"),
    ],
    /,
    *,
    format: Annotated[
        Literal["gguf", "mlx-lm"], Parameter(help="a model for llama.cpp, or an adapter in mlx-lm's layout")
    ] = "gguf",
    type: Annotated[FileType | None, Parameter(help="how gguf stores weights (default: Q4_K_M)")] = None,
    adapter: Annotated[
        Path | None, Parameter(help="for mlx-lm: adapter of the model, where SRC is not one that names its base")
    ] = None,
    ignore_key: Annotated[
        tuple[str, ...],
        Parameter(negative=(), show_default=False, help="key of config.json to let pass; may be given again"),
    ] = (),
    common: Common = COMMON,
) -> Outcome:
    """Make a GGUF file, for llama.cpp and what is built on it, of a model; or mlx-lm's adapter of an adapter.

    Example: smedjan export smollm2 smollm2.gguf --type Q8_0
    """
    if format == "mlx-lm":
        for flag, given in (("type", type), ("ignore_key", ignore_key)):
            if given:
                raise ConfigError("is for gguf", field=flag, remedy="leave it out, or give --format gguf")
        return _adapter(source, out, adapter, common)
    if adapter is not None:
        raise ConfigError(
            "gguf files here hold no adapter",
            field="adapter",
            remedy="merge it first: smedjan merge, or --format mlx-lm",
        )
    from smedjan.hf.export_gguf import export_gguf

    made = export_gguf(source, out, type=type or "Q4_K_M", ignore_keys=ignore_key, say=common.note)
    for line in made.notes:
        common.note(line)
    stored = ", ".join(f"{count} {kind}" for kind, count in sorted(made.types.items()))
    size = f"{made.bytes / 1e6:,.1f} MB"
    text = f"{out}: {made.architecture}, {made.parameters:,} parameters, {made.type}, {size} ({stored})"
    return Outcome(fields=vars(made), text=text)


def _adapter(source: str, out: Path, adapter: Path | None, common: Common) -> Outcome:
    from smedjan.hf.export_mlx_lm import export_adapter

    made = export_adapter(source, out, adapter=adapter)
    for line in made.notes:
        common.note(line)
    text = f"{out}: {made.modules} modules of {made.model_type}, rank {made.rank}, scale {made.scale:g}, on {made.base}"
    return Outcome(fields=vars(made), text=text)
