"""LoRA adapters in PEFT's layout, in and out, and their merge into the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.dtype import convert, to_float32
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.safetensors import open_file, save_file
from smedjan.errors import CheckpointError, ConfigError
from smedjan.hf.whole_modules import CONFIG, PREFIX
from smedjan.passes.lora import Lora, a_name, b_name

WEIGHTS = "adapter_model.safetensors"


def write_adapter(
    directory: Path,
    lora: Lora,
    tensors: Mapping[str, RawTensor],
    *,
    base: str,
    tied: Mapping[str, str] | None = None,
) -> None:
    """`adapter_model.safetensors`, then `adapter_config.json`: where the config is, the adapter is whole.

    Tensors under the model's own names are modules held whole (`whole_modules`). `tied` are second names of some
    (`DecoderConfig.tied`): PEFT ties them again, and wants them in the file.
    """
    whole = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    stored = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in tensors.items()}
    again = {PREFIX + second: whole[name] for second, name in (tied or {}).items() if name in whole}
    stored |= again
    save_file(directory / WEIGHTS, stored, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.targets),
        "bias": "none",
        "fan_in_fan_out": lora.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": lora.rslora,
        "rank_pattern": dict(lora.ranks),
        "alpha_pattern": dict(lora.alphas),
        "use_dora": False,
        "layers_to_transform": None if lora.layers is None else list(lora.layers),
        "modules_to_save": [name.removesuffix(".weight").rpartition(".")[2] for name in whole] or None,
        "ensure_weight_tying": bool(again),
    }
    write_atomic(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, True),
    "use_rslora": (False, True),
    "use_dora": (False,),
    "exclude_modules": (None, []),
    "trainable_token_indices": (None, []),
}
"""Keys of adapter_config.json whose other values we do not compute."""

NAME = re.compile(r"[\w.]+")


def read_adapter(directory: Path) -> tuple[Lora, Mapping[str, RawTensor]]:
    """The adapter in a PEFT directory. What plain LoRA does not cover is an error, never ignored; of modules held whole
    (`modules_to_save`), only the tensors are here: `hf.load.with_adapter` lays them over the model."""
    file = directory / CONFIG
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}", file=file, remedy="give a directory in PEFT's layout") from error
    for key, allowed in PLAIN.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ConfigError(
                f"{config[key]!r} is not supported", file=file, field=key, remedy=f"only {allowed[0]!r} is"
            )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets:
        raise ConfigError("must be a list of module names", file=file, field="target_modules", remedy="list them")
    try:
        lora = Lora(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=tuple(targets),
            layers=_layers(config.get("layers_to_transform"), file),
            transposed=config.get("fan_in_fan_out") is True,
            ranks=_pattern(config, "rank_pattern", int, file),
            alphas=_pattern(config, "alpha_pattern", float, file),
            rslora=config.get("use_rslora") is True,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"is missing or no number: {error}", file=file, field="r", remedy="save it with PEFT"
        ) from error
    return lora, open_file(directory / WEIGHTS)


def _pattern(config: Mapping[str, Any], key: str, number: type[Any], file: Path) -> tuple[tuple[str, Any], ...]:
    """PEFT takes its keys for regular expressions of the end of a module's name; here they are names."""
    pairs = config.get(key) or {}
    if not isinstance(pairs, dict):
        raise ConfigError(f"is {pairs!r}", file=file, field=key, remedy="give an object of names and numbers")
    made = []
    for name, value in pairs.items():
        if not NAME.fullmatch(name) or type(value) not in (int, number) or value <= 0:
            raise ConfigError(
                f"{name!r}: {value!r} is not supported", file=file, field=key, remedy="only plain names of modules are"
            )
        made.append((name, number(value)))
    return tuple(made)


def _layers(value: Any, file: Path) -> tuple[int, ...] | None:
    """PEFT's layers_to_transform: a number or a list of them; an empty list means all."""
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ConfigError(f"is {value!r}", file=file, field="layers_to_transform", remedy="list numbers of layers")
    return tuple(numbers)


def initial_adapter(lora: Lora, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, RawTensor]:
    """A uniform in +-1 / sqrt(in) (PEFT's kaiming_uniform with a = sqrt 5), B zero; from seed and site alone."""
    made = {}
    for site, (name, shape) in enumerate(lora.shapes(shapes).items()):
        if ".lora_A." in name:
            bound = 1.0 / np.sqrt(shape[1])
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, site])))
            values = generator.uniform(-bound, bound, size=shape).astype(np.float32)
        else:
            values = np.zeros(shape, dtype=np.float32)
        made[name] = RawTensor.of(values)
    return made


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What `merge` wrote: modules that had an adapter, and the largest change of a weight."""

    out: str
    dtype: str
    merged: int
    largest_change: float
    weights_sha256: str


def merged_weights(
    tensors: Mapping[str, RawTensor], lora: Lora, adapter: Mapping[str, RawTensor], dtype: str
) -> tuple[dict[str, RawTensor], int, float]:
    """W + s B A in float32, rounded to `dtype` once. Gives (weights, merged modules, largest change)."""
    made, merged, largest = {}, 0, 0.0
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if a_name(module) not in adapter:
            made[name] = convert(tensor, dtype)
            continue
        a, b = adapter[a_name(module)], adapter[b_name(module)]
        adapted = (b.shape[0], a.shape[1])[:: -1 if lora.transposed else 1]
        if adapted != tensor.shape:
            raise CheckpointError(
                f"adapts {list(adapted)}, the weight is {list(tensor.shape)}",
                field=a_name(module),
                remedy="give the model that this adapter was trained on",
            )
        delta = to_float32(b).reshape(b.shape) @ to_float32(a).reshape(a.shape) * np.float32(lora.scaling_of(module))
        values = to_float32(tensor).reshape(tensor.shape) + (delta.T if lora.transposed else delta)
        largest, merged = max(largest, float(np.abs(delta).max())), merged + 1
        wide = RawTensor(dtype="float32", shape=tensor.shape, data=memoryview(values.reshape(-1)).cast("B"))
        made[name] = convert(wide, dtype)
    unused = [name for name in adapter if name.endswith("lora_A.weight") and _weight_of(name) not in tensors]
    if unused:
        raise CheckpointError(
            "adapts a module that the model does not have",
            field=unused[0],
            remedy="give the model that this adapter was trained on",
        )
    return made, merged, largest


def _weight_of(adapter_name: str) -> str:
    return adapter_name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
