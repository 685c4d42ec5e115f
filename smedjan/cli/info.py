"""`smedjan info DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome


def info(
    model: Annotated[str, Parameter(help="model directory, adapter directory, hub id or .gguf file")],
    /,
    *,
    common: Common = COMMON,
) -> Outcome:
    """What a model is. Its files are checked, its weights are not loaded.

    Example: smedjan info smollm2
    """
    from smedjan.checkpoint.raw import specs_of
    from smedjan.hf.load import open_model

    adapter = _adapter(Path(model))
    files = open_model(model if adapter is None else adapter["base"])
    tied = files.config.tied()
    parameters = sum(spec.numel for spec in specs_of(files.tensors).values())
    fields = {
        "model_type": files.config.model_type,
        "parameters": parameters,
        "dtype": files.dtype,
        "tied": tied,
        "adapter": adapter,
    }
    lines = [
        f"model_type   {files.config.model_type}",
        f"parameters   {parameters:,}",
        f"dtype        {files.dtype}",
        f"tied         {', '.join(f'{name} = {other}' for name, other in tied.items()) or 'no'}",
    ]
    if adapter is not None:
        lines.append(f"adapter      rank {adapter['rank']}, alpha {adapter['alpha']:g}, on {adapter['base']}")
    return Outcome(fields=fields, text="\n".join(lines))


def _adapter(directory: Path) -> dict[str, Any] | None:
    """Of a directory that holds an adapter and no model of its own."""
    from smedjan.hf.peft import CONFIG, base_of, read_settings

    if not (directory / CONFIG).is_file() or (directory / "config.json").is_file():
        return None
    lora, _init = read_settings(directory)
    return {"base": base_of(directory)[0], "rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
