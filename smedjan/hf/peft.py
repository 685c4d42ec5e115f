"""LoRA adapters in PEFT's layout, in and out, and their merge into the weights; mlx-lm's are read in their place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.dtype import convert, to_float32
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.safetensors import open_file, save_file
from smedjan.errors import CheckpointError, ConfigError
from smedjan.hf import mlx_lm_adapter, pissa
from smedjan.hf.whole_modules import CONFIG, PREFIX
from smedjan.models.config import read_json_object
from smedjan.passes.lora import Lora, a_name, b_name, magnitude_name, module_of

WEIGHTS = "adapter_model.safetensors"


OURS = "smedjan."
"""Begins the keys of the weights' metadata that PEFT does not know, and does not read."""


def write_adapter(
    directory: Path,
    lora: Lora,
    tensors: Mapping[str, RawTensor],
    *,
    base: str,
    tied: Mapping[str, str] | None = None,
    trained: Mapping[str, str] | None = None,
) -> None:
    """`adapter_model.safetensors`, then `adapter_config.json`: where the config is, the adapter is whole.

    Tensors under the model's own names are modules held whole (`whole_modules`). `tied` are second names of some
    (`DecoderConfig.tied`): PEFT ties them again, and wants them in the file. `trained` says of the weights under
    it what `hf/trained.py` reads.
    """
    whole = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    stored = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in tensors.items()}
    again = {PREFIX + second: whole[name] for second, name in (tied or {}).items() if name in whole}
    stored |= again
    ours = {f"{OURS}{key}": value for key, value in (trained or {}).items()}
    save_file(directory / WEIGHTS, stored, {"format": "pt", **ours})
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
        "use_dora": lora.dora,
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
    "use_dora": (False, True),
    "exclude_modules": (None, []),
    "trainable_token_indices": (None, []),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "pissa"),
}
"""Keys of adapter_config.json whose other values we do not compute. Other starts than these change the base at random:
an adapter that was saved without a conversion to plain LoRA is of a base that nobody can make again."""

NAME = re.compile(r"[\w.]+")


def read_adapter(directory: Path, base: Mapping[str, RawTensor]) -> tuple[Lora, Mapping[str, RawTensor]]:
    """The adapter in a directory of PEFT's or mlx-lm's, for the weights of `base`; of modules held whole
    (`modules_to_save`), only the tensors are here: `hf.load.with_adapter` lays them over the model.

    A PiSSA adapter that was not converted belongs over the residual, which PEFT too makes of `base` when it loads it.
    """
    lora, init = read_settings(directory)
    tensors = tensors_of(directory)
    if mlx_lm_adapter.is_mlx_lm(directory):
        mlx_lm_adapter.check_modules(directory, tensors, base)
    if init == "pissa":
        return pissa.plain(lora, tensors, pissa.initial(lora, base, init, 0))
    return lora, tensors


def tensors_of(directory: Path) -> Mapping[str, RawTensor]:
    """Under PEFT's names, whichever layout."""
    if mlx_lm_adapter.is_mlx_lm(directory):
        return mlx_lm_adapter.tensors_of(directory)
    return open_file(directory / WEIGHTS)


def base_of(directory: Path) -> tuple[str, str]:
    """(the model that an adapter says it belongs to, the key that says so)."""
    key = "model" if mlx_lm_adapter.is_mlx_lm(directory) else "base_model_name_or_path"
    base = read_json_object(directory / CONFIG).get(key)
    if not isinstance(base, str):
        raise ConfigError(
            "names no base model", file=directory / CONFIG, field=key, remedy="give the base model and --adapter"
        )
    return base, key


def read_settings(directory: Path) -> tuple[Lora, Any]:
    """`adapter_config.json`, and its init_lora_weights. What we do not compute is an error, never ignored."""
    file = directory / CONFIG
    if mlx_lm_adapter.is_mlx_lm(directory):
        return mlx_lm_adapter.read_settings(directory), True
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read: {error}", file=file, remedy="give an adapter directory of PEFT's or mlx-lm's"
        ) from error
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
            dora=config.get("use_dora") is True,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"is missing or no number: {error}", file=file, field="r", remedy="save it with PEFT"
        ) from error
    return lora, config.get("init_lora_weights", True)


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
    """A uniform in +-1 / sqrt(in) (PEFT's kaiming_uniform with a = sqrt 5), B zero; from seed and site alone. DoRA's
    magnitudes come of the weights (`runtime/adapters.py`)."""
    made = {}
    for site, (name, shape) in enumerate(replace(lora, dora=False).shapes(shapes).items()):
        if ".lora_A." in name:
            bound = 1.0 / np.sqrt(shape[1])
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, site])))
            values = generator.uniform(-bound, bound, size=shape).astype(np.float32)
        else:
            values = np.zeros(shape, dtype=np.float32)
        made[name] = RawTensor.of(values)
    return made


def merged_weights(
    tensors: Mapping[str, RawTensor], lora: Lora, adapter: Mapping[str, RawTensor], dtype: str
) -> tuple[dict[str, RawTensor], int, float]:
    """W + s B A in float32, rounded to `dtype` once; of DoRA its rows are as long as their magnitude. Gives (weights,
    merged modules, largest change)."""
    made, merged, largest = {}, 0, 0.0
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if a_name(module) not in adapter:
            made[name] = convert(tensor, dtype)
            continue
        for part in (b_name(module), *((magnitude_name(module),) if lora.dora else ())):
            if part not in adapter:
                raise CheckpointError("is missing", field=part, remedy="save the adapter again")
        a, b = adapter[a_name(module)], adapter[b_name(module)]
        adapted = (b.shape[0], a.shape[1])[:: -1 if lora.transposed else 1]
        if adapted != tensor.shape:
            raise CheckpointError(
                f"adapts {list(adapted)}, the weight is {list(tensor.shape)}",
                field=a_name(module),
                remedy="give the model that this adapter was trained on",
            )
        before = pissa.values(tensor).T if lora.transposed else pissa.values(tensor)
        after = before + pissa.values(b) @ pissa.values(a) * np.float32(lora.scaling_of(module))
        if lora.dora:
            lengths = np.linalg.norm(after, axis=1, keepdims=True)
            after *= to_float32(adapter[magnitude_name(module)])[:, None] / lengths
        largest, merged = max(largest, float(np.abs(after - before).max())), merged + 1
        made[name] = convert(RawTensor.of(np.ascontiguousarray(after.T if lora.transposed else after)), dtype)
    unused = [name for name in adapter if ".lora_" in name and f"{module_of(name)}.weight" not in tensors]
    if unused:
        raise CheckpointError(
            "adapts a module that the model does not have",
            field=unused[0],
            remedy="give the model that this adapter was trained on",
        )
    return made, merged, largest
