"""`smedjan export SRC OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome
from smedjan.errors import ConfigError

if TYPE_CHECKING:
    from smedjan.hf.export_gguf import ExportReport
    from smedjan.hf.export_mlx import MlxReport

FileType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"]


def export(
    source: Annotated[str, Parameter(help="model directory or hub id (org/name[@revision])")],
    out: Annotated[Path, Parameter(help=".gguf file to make, with a Modelfile for ollama beside it, or directory")],
    /,
    *,
    to: Annotated[Literal["gguf", "mlx"], Parameter(help="a GGUF file, or a directory in MLX's few bits")] = "gguf",
    type: Annotated[FileType | None, Parameter(help="gguf: how weights are stored (Q4_K_M)")] = None,
    bits: Annotated[int | None, Parameter(help="mlx: of a code, 2, 3, 4, 5, 6 or 8 (4)")] = None,
    group_size: Annotated[int | None, Parameter(help="mlx: values that share a scale, 32, 64 or 128 (64)")] = None,
    ignore_key: Annotated[
        tuple[str, ...],
        Parameter(negative=(), show_default=False, help="key of config.json to let pass; may be given again"),
    ] = (),
    common: Common = COMMON,
) -> Outcome:
    """Make a GGUF file, for llama.cpp and what is built on it, or a quantised directory for mlx-lm, of a model
    directory.

    Example: smedjan export smollm2 smollm2.gguf --type Q8_0
    """
    others = {"bits": bits, "group-size": group_size} if to == "gguf" else {"type": type}
    for field, value in others.items():
        if value is not None:
            raise ConfigError(f"is {value}, with --to {to}", field=field, remedy="leave it out, or give another --to")
    if to == "mlx":
        from smedjan.hf.export_mlx import export_mlx

        made = export_mlx(source, out, bits=bits, group_size=group_size, ignore_keys=ignore_key, say=common.note)
        return _told(made, f"{made.bits} bits in groups of {made.group_size}", common)
    from smedjan.hf.export_gguf import export_gguf

    file = export_gguf(source, out, type=type or "Q4_K_M", ignore_keys=ignore_key, say=common.note)
    return _told(file, file.type, common)


def _told(made: ExportReport | MlxReport, kind: str, common: Common) -> Outcome:
    for line in made.notes:
        common.note(line)
    stored = ", ".join(f"{count} {each}" for each, count in sorted(made.types.items()))
    size = f"{made.bytes / 1e6:,.1f} MB"
    name = getattr(made, "architecture", made.model_type)
    text = f"{made.out}: {name}, {made.parameters:,} parameters, {kind}, {size} ({stored})"
    return Outcome(fields=vars(made), text=text)
