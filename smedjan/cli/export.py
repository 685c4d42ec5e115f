"""`smedjan export SRC OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome
from smedjan.errors import ConfigError

if TYPE_CHECKING:
    from smedjan.hf.export_gguf import ExportReport
    from smedjan.hf.export_mlx import MlxReport

FileType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"]
Target = Literal["gguf", "mlx", "mlx-adapter"]

OF = {
    "type": ("gguf",),
    "bits": ("mlx",),
    "group-size": ("mlx",),
    "adapter": ("mlx-adapter",),
    "ignore-key": ("gguf", "mlx"),
}
"""Which of the targets a flag is for."""


def export(
    source: Annotated[str, Parameter(help="model directory or hub id (org/name[@revision]); an adapter directory")],
    out: Annotated[Path, Parameter(help=".gguf file to make, with a Modelfile for ollama beside it, or directory")],
    /,
    *,
    to: Annotated[
        Target, Parameter(help="a GGUF file, a directory in MLX's few bits, or an adapter in mlx-lm's layout")
    ] = "gguf",
    type: Annotated[FileType | None, Parameter(help="gguf: how weights are stored (Q4_K_M)")] = None,
    bits: Annotated[int | None, Parameter(help="mlx: of a code, 2, 3, 4, 5, 6 or 8 (4)")] = None,
    group_size: Annotated[int | None, Parameter(help="mlx: values that share a scale, 32, 64 or 128 (64)")] = None,
    adapter: Annotated[
        Path | None, Parameter(help="mlx-adapter: of the model, where SRC is not one that names its base")
    ] = None,
    ignore_key: Annotated[
        tuple[str, ...],
        Parameter(negative=(), show_default=False, help="key of config.json to let pass; may be given again"),
    ] = (),
    common: Common = COMMON,
) -> Outcome:
    """Make a GGUF file, for llama.cpp and what is built on it, or a quantised directory for mlx-lm, of a model
    directory; or mlx-lm's adapter of an adapter.

    Example: smedjan export smollm2 smollm2.gguf --type Q8_0
    """
    given: dict[str, Any] = {
        "type": type,
        "bits": bits,
        "group-size": group_size,
        "adapter": adapter,
        "ignore-key": ignore_key or None,
    }
    for field, value in given.items():
        if value is not None and to not in OF[field]:
            remedy = "leave it out, or give another --to"
            if field == "adapter":
                remedy = "merge it first: smedjan merge, or --to mlx-adapter"
            raise ConfigError(f"is {value}, with --to {to}", field=field, remedy=remedy)
    if to == "mlx-adapter":
        return _adapter(source, out, adapter, common)
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


def _adapter(source: str, out: Path, adapter: Path | None, common: Common) -> Outcome:
    from smedjan.hf.export_mlx_lm import export_adapter

    made = export_adapter(source, out, adapter=adapter)
    for line in made.notes:
        common.note(line)
    text = f"{out}: {made.modules} modules of {made.model_type}, rank {made.rank}, scale {made.scale:g}, on {made.base}"
    return Outcome(fields=vars(made), text=text)
