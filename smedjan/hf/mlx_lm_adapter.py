"""LoRA and DoRA adapters in mlx-lm's layout: `adapters.safetensors` beside an `adapter_config.json` of its own.

mlx-lm (`tuner/lora.py`, `tuner/dora.py`) computes y = W x + scale B A x with lora_a [in, rank] and lora_b [rank, out],
the transposes of PEFT's, and DoRA's m [out]. One rank and one scale are all adapters'. Its config names the modules by
`keys`: within each of the last `num_layers` blocks, or by their whole names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.atomic import write_atomic
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.raw import RawTensor
from smedjan.checkpoint.safetensors import open_file, save_file
from smedjan.errors import CheckpointError, ConfigError
from smedjan.hf.whole_modules import CONFIG
from smedjan.models.config import read_json_object
from smedjan.passes.lora import Lora, a_name, b_name, magnitude_name, module_of

WEIGHTS = "adapters.safetensors"

PARTS = {"lora_a": a_name, "lora_b": b_name, "m": magnitude_name}
"""mlx-lm's name of each part of an adapter, and PEFT's."""

TYPES = ("lora", "dora")
_BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(.+)")


_GPT_NEOX = (
    (re.compile(r"model\.h\.(?=\d+\.(?:attention|mlp\.dense_))"), "gpt_neox.layers."),
    (re.compile(r"model\.embed_out$"), "lm_head"),
)
"""mlx-lm's names of the one family's modules that has others there, and HF's. No other family has such."""


def is_mlx_lm(directory: Path) -> bool:
    """Whether the adapter there is in this layout, by the keys that one of the two configs has alone."""
    file = directory / CONFIG
    if not file.is_file():
        return False
    config = read_json_object(file)
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read_settings(directory: Path) -> Lora:
    """The config, and of the weights' names which modules have an adapter: alpha is scale times rank."""
    file = directory / CONFIG
    config = read_json_object(file)
    kind = config.get("fine_tune_type", "lora")
    if kind not in TYPES:
        raise ConfigError(
            f"is {kind!r}: these are weights, not adapters",
            file=file,
            field="fine_tune_type",
            remedy="make a model of it (mlx_lm.fuse), and import that",
        )
    given = config.get("lora_parameters")
    if not isinstance(given, dict):
        raise ConfigError("must be an object", file=file, field="lora_parameters", remedy="save it with mlx-lm")
    rank = _number(given, "rank", file)
    if rank != int(rank) or rank < 1:
        raise ConfigError(f"is {rank:g}", file=file, field="lora_parameters.rank", remedy="give a whole number")
    targets, layers = _targets(_modules(directory, kind, int(rank)))
    return Lora(
        rank=int(rank),
        alpha=_number(given, "scale", file) * rank,
        dropout=_number(given, "dropout", file) if "dropout" in given else 0.0,
        targets=targets,
        layers=layers,
        dora=kind == "dora",
    )


def tensors_of(directory: Path) -> Mapping[str, RawTensor]:
    """Under PEFT's names, in its shapes."""
    found = open_file(directory / WEIGHTS)
    made = {}
    for name in found:
        module, _, part = name.rpartition(".")
        tensor = found[name]
        made[PARTS[part](_ours(module))] = tensor if part == "m" else _transposed(tensor)
    return made


def check_modules(directory: Path, tensors: Mapping[str, RawTensor], base: Mapping[str, RawTensor]) -> None:
    """An adapter of something that the base has not: to mlx-lm an error, and so here."""
    for name in tensors:
        module = module_of(name)
        if f"{module}.weight" not in base:
            raise CheckpointError(
                "adapts a module that the model does not have",
                file=directory / WEIGHTS,
                field=module,
                remedy="give the model that this adapter was trained on",
            )


def write_adapter(
    directory: Path,
    tensors: Mapping[str, RawTensor],
    modules: Iterable[str],
    *,
    rank: int,
    scale: float,
    dropout: float,
    dora: bool,
    layers: int,
    base: str,
    model_type: str,
) -> None:
    """`tensors` under PEFT's names become both files, the config last. `layers`: of the model."""
    theirs = {module: _theirs(module) if model_type == "gpt_neox" else module for module in modules}
    chosen = tuple(theirs.values())
    stored = {}
    for module, called in theirs.items():
        for part, name in PARTS.items():
            if part != "m" or dora:
                tensor = convert(tensors[name(module)], "float32")
                stored[f"{called}.{part}"] = tensor if part == "m" else _transposed(tensor)
    save_file(directory / WEIGHTS, stored, {"format": "mlx"})
    keys, last = _keys(chosen, layers)
    config = {
        "model": base,
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": last,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
    }
    write_atomic(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _modules(directory: Path, kind: str, rank: int) -> tuple[str, ...]:
    """Of the tensors, each of which is checked by its name, number of dims and rank."""
    file = directory / WEIGHTS
    entries = open_file(file).entries
    parts = PARTS if kind == "dora" else {"lora_a", "lora_b"}
    found: dict[str, None] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        if part not in parts:
            raise CheckpointError(
                f"is no part of a {kind} adapter", file=file, field=name, remedy="give what mlx_lm.lora saved"
            )
        if entry.spec.dtype not in _BITS:
            raise CheckpointError(
                f"is of {entry.spec.dtype}", file=file, field=name, remedy="give what mlx_lm.lora saved"
            )
        if len(entry.spec.shape) != (1 if part == "m" else 2) or module.rpartition(".")[2] in _EMBEDDINGS:
            raise CheckpointError(
                f"{list(entry.spec.shape)} adapts no linear layer, and only those take adapters here",
                file=file,
                field=name,
                remedy="make a model of it (mlx_lm.fuse), and import that",
            )
        if part != "m" and entry.spec.shape[part == "lora_a"] != rank:
            raise CheckpointError(
                f"has shape {list(entry.spec.shape)}, and lora_parameters.rank is {rank}",
                file=file,
                field=name,
                remedy="save it again with mlx-lm",
            )
        found[_ours(module)] = None
    if not found:
        raise CheckpointError("holds no adapter", file=file, remedy="give what mlx_lm.lora saved")
    return tuple(found)


def _ours(module: str) -> str:
    for pattern, name in _GPT_NEOX:
        module = pattern.sub(name, module)
    return module


def _theirs(module: str) -> str:
    """Of GPT-NeoX."""
    return "model.embed_out" if module == "lm_head" else module.replace("gpt_neox.layers.", "model.h.")


def _targets(modules: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """(targets, layers) of PEFT: names within a block and the blocks that have all of them, else whole names."""
    blocks: dict[int, set[str]] = {}
    for module in modules:
        place = _BLOCK.fullmatch(module)
        if place is None:
            return modules, None
        blocks.setdefault(int(place[1]), set()).add(place[2])
    inside = next(iter(blocks.values()))
    if any(names != inside for names in blocks.values()):
        return modules, None
    return tuple(sorted(inside)), tuple(sorted(blocks))


def _keys(modules: tuple[str, ...], layers: int) -> tuple[list[str], int]:
    """(keys, num_layers): names within a block where it is the last blocks that have them all, else whole names."""
    targets, numbers = _targets(modules)
    if numbers is not None and numbers == tuple(range(layers - len(numbers), layers)):
        return list(targets), len(numbers)
    return list(modules), layers


def _number(given: Mapping[str, Any], key: str, file: Path) -> float:
    value = given.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(
            "is missing" if value is None else f"is {value!r}",
            file=file,
            field=f"lora_parameters.{key}",
            remedy="give a number",
        )
    return value


def _transposed(tensor: RawTensor) -> RawTensor:
    """Bits of any dtype, moved."""
    bits = np.frombuffer(tensor.data, _BITS[tensor.dtype]).reshape(tensor.shape)
    return RawTensor.of(np.ascontiguousarray(bits.T), tensor.dtype)
