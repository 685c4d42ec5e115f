"""Export: an adapter in mlx-lm's layout, beside the same base. What that cannot say is an error before anything is
written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from smedjan.checkpoint.atomic import new_directory
from smedjan.checkpoint.digest import sha256_of_file
from smedjan.errors import ConfigError
from smedjan.hf.load import ModelFiles, checked_adapter, open_model, resolve
from smedjan.hf.mlx_lm_adapter import WEIGHTS, write_adapter
from smedjan.hf.trained import told
from smedjan.hf.whole_modules import CONFIG, saved_names
from smedjan.passes.lora import Lora, module_of

MERGE = "merge it into a model, which mlx-lm loads: smedjan merge"


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What an export wrote: how many modules have an adapter, of which rank and scale. `files`: [{path, sha256}]."""

    out: Path
    model_type: str
    base: str
    modules: int
    rank: int
    scale: float
    files: tuple[dict[str, str], ...]
    notes: tuple[str, ...]


def export_adapter(source: str | Path, out: str | Path, *, adapter: str | Path | None = None) -> AdapterReport:
    """Write the adapter in `source`, or `adapter` of the model in `source`, to the new directory `out`."""
    base, directory = resolve(source, adapter)
    if directory is None:
        raise ConfigError(
            "holds a model, which mlx-lm loads as it is",
            file=source,
            field="to",
            remedy="give an adapter: its directory, or the base model and --adapter",
        )
    files = open_model(base)
    if saved_names(directory)[0]:
        raise ConfigError(
            "mlx-lm's adapters hold no module whole", file=directory / CONFIG, field="modules_to_save", remedy=MERGE
        )
    lora, tensors = checked_adapter(files, directory)
    modules = tuple(dict.fromkeys(module_of(name) for name in tensors))
    _check_names(files)
    rank, scale = _common(lora, modules, directory)
    with new_directory(Path(out)) as partial:
        write_adapter(
            partial,
            tensors,
            modules,
            rank=rank,
            scale=scale,
            dropout=lora.dropout,
            dora=lora.dora,
            layers=files.config.num_hidden_layers,
            base=str(base),
            model_type=files.config.model_type,
        )
    storage = told(directory).get("storage")
    note = f"trained beside weights in {storage}: mlx-lm lays it beside those that the base stores"
    return AdapterReport(
        out=Path(out),
        model_type=files.config.model_type,
        base=str(base),
        modules=len(modules),
        rank=rank,
        scale=scale,
        files=tuple({"path": name, "sha256": sha256_of_file(Path(out) / name)} for name in (WEIGHTS, CONFIG)),
        notes=() if storage is None else (note,),
    )


def _check_names(files: ModelFiles) -> None:
    kind = files.config.model_type
    if files.config.conv1d:
        raise ConfigError(
            f"mlx-lm calls the modules of {kind} otherwise, and transposes them",
            file=files.path / "config.json",
            field="model_type",
            remedy=MERGE,
        )


def _common(lora: Lora, modules: Collection[str], directory: Path) -> tuple[int, float]:
    """The rank and the scale that all adapters have."""
    if not modules:
        raise ConfigError("adapts nothing of this model", file=directory, remedy="give the base that it was trained on")
    ranks = {lora.rank_of(module): module for module in modules}
    scales = {lora.scaling_of(module): module for module in modules}
    for field, found in (("rank_pattern", ranks), ("alpha_pattern", scales)):
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            what = "rank" if found is ranks else "scale"
            raise ConfigError(
                f"mlx-lm has one {what} for all adapters, and these are {one:g} ({first}) and {other:g} ({second})",
                file=directory / CONFIG,
                field=field,
                remedy=MERGE,
            )
    return next(iter(ranks)), next(iter(scales))
