"""Models in mlx-lm's quantised directories: what `quantization` in config.json says, and the tensors it speaks of.

    "quantization": {"group_size": 64, "bits": 4, "mode": "affine", "model.layers.0.mlp.down_proj": {...} or false}

MODULE.weight (uint32), MODULE.scales and MODULE.biases are one weight: `checkpoint/affine.py`. A module that has no
scales is held whole. mlx-lm writes the same object a second time as `quantization_config`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smedjan.checkpoint.affine import BIASES, SCALES, WEIGHT, AffineTensor, dequantize
from smedjan.checkpoint.raw import LazyTensor, RawTensor, TensorSpec
from smedjan.errors import CheckpointError, ConfigError, nearest
from smedjan.models.decoder_config import DecoderConfig
from smedjan.ops.quantized import AFFINE_BITS, AFFINE_GROUPS, Affine

KEY, COPY = "quantization", "quantization_config"
UNQUANTIZED = "give the unquantized model, or one made with mlx_lm.convert -q --q-mode affine"
FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """`by_module` holds the modules that are named one by one, None for those that are not quantised."""

    every: Affine
    by_module: Mapping[str, Affine | None]

    def of(self, module: str) -> Affine | None:
        return self.by_module.get(module, self.every)


def take_quantization(config: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], Quantization | None]:
    """config.json without what mlx-lm adds to it, and that."""
    said, copied = config.get(KEY), config.get(COPY)
    if said is None:
        return dict(config), None  # `quantization_config` alone is transformers': read_config refuses it
    if copied is not None and copied != said:
        raise ConfigError(
            f"differs from {KEY}, of which mlx-lm writes it as a copy",
            file=file,
            field=COPY,
            remedy="drop the wrong one",
        )
    if not isinstance(said, dict):
        raise ConfigError(f"is {said!r}, not an object", file=file, field=KEY, remedy=UNQUANTIZED)
    every = _settings(said, KEY, file, others=True)
    modules: dict[str, Affine | None] = {}
    for name, value in said.items():
        if name in ("group_size", "bits", "mode"):
            continue
        field = f"{KEY}.{name}"
        if isinstance(value, dict):
            modules[name] = _settings(value, field, file, others=False)
        elif isinstance(value, bool) and "." in name:
            modules[name] = every if value else None
        elif "." not in name and name != "lm_head":
            close = nearest(name, {"group_size", "bits", "mode"})
            hint = f"did you mean {close!r}? " if close else ""
            raise ConfigError("is not known", file=file, field=field, remedy=f"{hint}{UNQUANTIZED}")
        else:
            raise ConfigError(f"is {value!r}", file=file, field=field, remedy="give {group_size, bits} or false")
    return {key: value for key, value in config.items() if key not in (KEY, COPY)}, Quantization(
        every=every, by_module=modules
    )


def _settings(said: Mapping[str, Any], field: str, file: Path, *, others: bool) -> Affine:
    mode = said.get("mode", "affine")
    if mode != "affine":
        raise ConfigError(
            f"is {mode!r}, and affine alone is read", file=file, field=f"{field}.mode", remedy=UNQUANTIZED
        )
    unknown = [] if others else [key for key in said if key not in ("group_size", "bits", "mode")]
    if unknown:
        raise ConfigError("is not known", file=file, field=f"{field}.{unknown[0]}", remedy=UNQUANTIZED)
    for key, known in (("bits", AFFINE_BITS), ("group_size", AFFINE_GROUPS)):
        value = said.get(key)
        if type(value) is not int or value not in known:
            what = "is missing" if key not in said else f"is {value!r}"
            supported = ", ".join(map(str, known))
            raise ConfigError(what, file=file, field=f"{field}.{key}", remedy=f"supported: {supported}")
    return Affine(bits=said["bits"], group_size=said["group_size"])


def joined(
    entries: Mapping[str, LazyTensor], quantization: Quantization, config: DecoderConfig, file: Path
) -> dict[str, LazyTensor]:
    """The tensors with those of each quantised weight as one, an `AffineTensor`."""
    if config.conv1d:
        raise ConfigError(
            f"{config.model_type} has its weights transposed in mlx-lm", file=file, field=KEY, remedy=UNQUANTIZED
        )
    made = dict(entries)
    modules = {name.removesuffix(".weight") for name in (*config.linear_weights(), config.embedding, config.head)}
    modules |= {name.removesuffix(".weight") for name in config.tied()}
    by_module: dict[str, Affine | None] = {}
    for named, held in quantization.by_module.items():
        module = named if named in modules else config.parameter(f"{named}.weight").removesuffix(".weight")
        by_module[module] = held
        if module not in modules:
            close = nearest(named, modules)
            hint = f"did you mean {close!r}? " if close else ""
            raise ConfigError(
                "the model has no such layer to quantise",
                file=file,
                field=f"{KEY}.{named}",
                remedy=f"{hint}correct config.json",
            )
    quantization = replace(quantization, by_module=by_module)
    shapes = config.parameter_shapes()
    shapes |= {alias: shapes[name] for alias, name in config.tied().items()}
    for module in sorted(modules):
        name = f"{module}.{WEIGHT}"
        entry = entries.get(name)
        if entry is None:
            continue  # a tied head, or one that is missing: the caller says so
        settings = quantization.of(module)
        if (
            f"{module}.{SCALES}" not in entries
            and entry.spec.dtype in FLOATS
            and quantization.by_module.get(module) is None
        ):
            continue
        if settings is None:
            raise CheckpointError(
                f"is quantised, and {file.name} says it is not",
                file=entry.file,
                field=name,
                remedy=f"correct {KEY}.{module} in config.json",
            )
        stored = {WEIGHT: entry}
        for suffix in (SCALES, BIASES):
            part = made.pop(f"{module}.{suffix}", None)
            if part is None:
                raise CheckpointError(
                    "the tensor is missing",
                    file=entry.file,
                    field=f"{module}.{suffix}",
                    remedy="get the weights again: a quantised layer has weight, scales and biases",
                )
            stored[suffix] = part
        made[name] = _affine(module, stored, settings, shapes[name], file)
    return made


def _affine(
    module: str, stored: Mapping[str, LazyTensor], settings: Affine, shape: tuple[int, ...], file: Path
) -> AffineTensor:
    scales = stored[SCALES]
    if scales.spec.dtype not in FLOATS:
        raise CheckpointError(
            f"is stored as {scales.spec.dtype}: not the affine format",
            file=scales.file,
            field=f"{module}.{SCALES}",
            remedy=UNQUANTIZED,
        )
    expected = settings.specs(shape, scales.spec.dtype)
    fits = shape[1] % settings.group_size == 0
    for (suffix, entry), spec in zip(stored.items(), expected.values(), strict=True):
        found = entry.spec
        if not fits or (found.shape, found.dtype) != (spec.shape, spec.dtype):
            raise CheckpointError(
                f"is {found.dtype}{list(found.shape)}, not {spec.dtype}{list(spec.shape)}: {list(shape)} of "
                f"{settings.bits} bits in groups of {settings.group_size}, as {file.name} has it",
                file=entry.file,
                field=f"{module}.{suffix}",
                remedy=f"correct {KEY} in config.json, or get the weights that belong to it",
            )
    weight = stored[WEIGHT]
    whole = TensorSpec(dtype=scales.spec.dtype, shape=shape)
    stream = partial(_widened, stored, settings)
    return AffineTensor(
        spec=whole,
        file=weight.file,
        name=weight.name,
        load=lambda: RawTensor.joined(whole, stream()),
        stream=stream,
        bits=settings.bits,
        group_size=settings.group_size,
        stored=stored,
    )


def _widened(stored: Mapping[str, LazyTensor], settings: Affine) -> Iterator[RawTensor]:
    parts = {suffix: entry.load() for suffix, entry in stored.items()}
    yield from dequantize(parts, **vars(settings))
    for part in parts.values():
        part.drop_pages()


def kinds(entries: Mapping[str, LazyTensor]) -> dict[str, int]:
    """How many weights there are of each kind, for reports."""
    found: dict[str, int] = {}
    for entry in entries.values():
        if isinstance(entry, AffineTensor):
            kind = f"MLX {entry.bits} bits in groups of {entry.group_size}"
            found[kind] = found.get(kind, 0) + 1
    return found
