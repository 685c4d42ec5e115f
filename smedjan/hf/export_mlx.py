"""Export: a model directory as mlx-lm quantises and loads it, in MLX's affine format. MLX is not asked.

Linear layers, the embedding and the head are coded as `mx.quantize` does it on the CPU, to the bit; those whose rows
are no whole groups stay as they are, as they do in mlx-lm. What is in this format already keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smedjan.checkpoint.affine import BIASES, SCALES, WEIGHT, AffineTensor, affine_of, quantize
from smedjan.checkpoint.atomic import new_directory, refuse_existing, write_atomic
from smedjan.checkpoint.digest import sha256_of_file
from smedjan.checkpoint.dtype import first_nonfinite
from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor, TensorSpec, specs_of
from smedjan.checkpoint.safetensors import save_sharded
from smedjan.checkpoint.sizes import require_space
from smedjan.errors import CheckpointError, ConfigError
from smedjan.hf.export import complete_config, json_bytes, put_along
from smedjan.hf.hub import Say
from smedjan.hf.import_model import match_tensors, read_source
from smedjan.hf.mlx_format import COPY, FLOATS, KEY, Quantization
from smedjan.models.registry import read_config
from smedjan.ops.quantized import AFFINE_BITS, AFFINE_GROUPS, Affine

DEFAULT = Affine(bits=4, group_size=64)
"""mlx-lm's."""


@dataclass(frozen=True, kw_only=True)
class MlxReport:
    """What an export wrote. `types` counts tensors by how they are stored; `files`: [{path, sha256}]."""

    out: Path
    model_type: str
    bits: int
    group_size: int
    parameters: int
    bytes: int
    types: dict[str, int]
    files: tuple[dict[str, str], ...]
    notes: tuple[str, ...]


def export_mlx(
    source: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    ignore_keys: Iterable[str] = (),
    say: Say = lambda line: None,
) -> MlxReport:
    """Write the model directory (or hub id) `source` to the new directory `out`. `bits` and `group_size` default to 4
    and 64, or to what `source` is in already."""
    for field, value, known in (("bits", bits, AFFINE_BITS), ("group-size", group_size, AFFINE_GROUPS)):
        if value is not None and value not in known:
            raise ConfigError(f"is {value}", field=field, remedy=f"supported: {', '.join(map(str, known))}")
    out, ignored = Path(out), tuple(ignore_keys)
    refuse_existing(out)
    if str(source).endswith(".gguf"):
        raise CheckpointError("is a GGUF file", file=source, remedy="import it first: smedjan import FILE DIR")
    read = read_source(source, ignored, say)
    config = read_config(read.config, read.file, ignored)
    if config.conv1d:
        raise ConfigError(
            f"mlx-lm lays the weights of {config.model_type} out in another way",
            file=read.file,
            field="model_type",
            remedy="export it as GGUF: smedjan export SRC OUT.gguf",
        )
    tensors, _ = match_tensors(read, config)
    dtype = _dtype(tensors, read.file.parent)
    given, held = Affine(bits=bits or DEFAULT.bits, group_size=group_size or DEFAULT.group_size), affine_of(tensors)
    quantization = read.mlx or Quantization(every=given, by_module={})
    every = quantization.every
    if (bits or every.bits, group_size or every.group_size) != (every.bits, every.group_size):
        raise ConfigError(
            f"is in {every.bits} bits in groups of {every.group_size} already",
            file=read.file,
            field=KEY,
            remedy="leave --bits and --group-size out, or import it first: smedjan import DIR OUT",
        )
    coded = {config.embedding, config.head, *config.linear_weights()} if read.mlx is None else set(held)
    narrow = {name for name in coded if read.mlx or tensors.entries[name].spec.shape[1] % given.group_size == 0}
    if not narrow:
        raise ConfigError(
            f"no layer's rows are whole groups of {given.group_size}",
            file=read.file,
            field="group-size",
            remedy=f"supported: {', '.join(map(str, AFFINE_GROUPS))}",
        )
    notes = list(read.notes)
    if left := sorted(coded - narrow):
        notes.append(f"{len(left)} weights stay {dtype}: their rows are no whole groups ({left[0]})")
    names = dict(config.stored)
    written: dict[str, LazyTensor] = {}
    types: dict[str, int] = {}
    for name, entry in tensors.entries.items():
        settings = given
        if isinstance(entry, AffineTensor):
            settings = Affine(bits=entry.bits, group_size=entry.group_size)
        kind = f"{settings.bits} bits in groups of {settings.group_size}" if name in narrow else dtype
        types[kind] = types.get(kind, 0) + 1
        stored = names.get(name, name)
        written.update(_coded(stored, entry, settings) if name in narrow else {stored: _finite(stored, entry)})
    size = sum(entry.spec.nbytes for entry in written.values())
    require_space(out, size, "the model")
    complete = complete_config(read.config, read.file, dtype, ignored)
    said = _said(quantization)
    with new_directory(out) as partial_out:
        save_sharded(partial_out, LazyTensors(written))
        put_along(partial_out, read.files_from)
        write_atomic(partial_out / "config.json", json_bytes({**complete, KEY: said, COPY: said}))
        paths = sorted(path for path in partial_out.rglob("*") if path.is_file())
        files = tuple(
            {"path": path.relative_to(partial_out).as_posix(), "sha256": sha256_of_file(path)} for path in paths
        )
    return MlxReport(
        out=out,
        model_type=config.model_type,
        bits=quantization.every.bits,
        group_size=quantization.every.group_size,
        parameters=sum(spec.numel for spec in specs_of(tensors).values()),
        bytes=size,
        types=types,
        files=files,
        notes=tuple(notes),
    )


def _dtype(tensors: LazyTensors, folder: Path) -> str:
    found = sorted({entry.spec.dtype for entry in tensors.entries.values()})
    if len(found) > 1 or found[0] not in FLOATS:
        raise CheckpointError(
            f"tensors are stored as {', '.join(found)}",
            file=folder,
            field="dtype",
            remedy="import it first, with --dtype: smedjan import DIR OUT",
        )
    return found[0]


def _said(quantization: Quantization) -> dict[str, Any]:
    """The object of config.json."""
    modules = {
        name: False if settings is None else {**_ordered(settings), "mode": "affine"}
        for name, settings in quantization.by_module.items()
    }
    return {**_ordered(quantization.every), "mode": "affine", **modules}


def _ordered(settings: Affine) -> dict[str, int]:
    return {"group_size": settings.group_size, "bits": settings.bits}


def _finite(name: str, entry: LazyTensor) -> LazyTensor:
    """The same tensor; NaN and infinity in it are an error."""

    def stream() -> Iterator[RawTensor]:
        before = 0
        for part in entry.parts():
            at = first_nonfinite(part)
            if at is not None:
                raise CheckpointError(
                    f"holds NaN or infinity (element {before + at})",
                    file=entry.file,
                    field=name,
                    remedy="get sound weights",
                )
            yield part
            before += part.numel

    return LazyTensor.of_parts(entry.spec, entry.file, stream)


def _coded(name: str, entry: LazyTensor, settings: Affine) -> dict[str, LazyTensor]:
    """MODULE.weight, MODULE.scales and MODULE.biases of a weight."""
    module = name.removesuffix(f".{WEIGHT}")
    if isinstance(entry, AffineTensor):
        parts = entry.stored
        checked = {suffix: _finite(f"{module}.{suffix}", parts[suffix]) for suffix in (SCALES, BIASES)}
        return {name: parts[WEIGHT], **{f"{module}.{suffix}": part for suffix, part in checked.items()}}
    # Made again for each of the three, which lie apart in the file: kept, all weights' codes would be in memory.
    made = partial(_quantized, name, entry, settings)
    specs = settings.specs(entry.spec.shape, entry.spec.dtype)

    def load(suffix: str) -> Callable[[], RawTensor]:
        return lambda: made()[suffix]

    return {
        f"{module}.{suffix}": LazyTensor(
            spec=TensorSpec(dtype=spec.dtype, shape=spec.shape), file=entry.file, load=load(suffix)
        )
        for suffix, spec in zip((WEIGHT, SCALES, BIASES), specs.values(), strict=True)
    }


def _quantized(name: str, entry: LazyTensor, settings: Affine) -> dict[str, RawTensor]:
    return quantize(_finite(name, entry).load(), bits=settings.bits, group_size=settings.group_size)
