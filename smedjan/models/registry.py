"""Which `model_type`s there are, and the one way from a `config.json` to a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from smedjan.errors import ConfigError, nearest
from smedjan.models import llama
from smedjan.models.llama import LlamaConfig

ARCHITECTURES: dict[str, ModuleType] = {"llama": llama}
"""HF `model_type` -> the module with ARCHITECTURE, read, write, parameter_shapes and tied."""


def read_config(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> LlamaConfig:
    """The configuration in `config.json`, whatever its architecture; what we cannot compute is a ConfigError."""
    ignored = tuple(ignore_keys)
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        close = nearest(model_type, set(ARCHITECTURES)) if isinstance(model_type, str) else None
        hint = f"did you mean {close!r}? " if close else ""
        raise ConfigError(
            "is missing" if model_type is None else f"{model_type!r} is not supported",
            file=file,
            field="model_type",
            remedy=f"{hint}supported: {', '.join(sorted(ARCHITECTURES))}",
        )
    for key in ("quantization_config", "quantization"):
        if data.get(key) is not None:
            raise ConfigError(
                "quantized weights are not supported here",
                file=file,
                field=key,
                remedy="import the unquantized model, or a .gguf file, which is dequantized",
            )
    if data.get("auto_map") is not None and "auto_map" not in ignored:
        raise ConfigError(
            "the model brings its own code, which smedjan never runs",
            file=file,
            field="auto_map",
            remedy="if its weights are a plain model of this type, pass --ignore-key auto_map",
        )
    module = ARCHITECTURES[model_type]
    architectures = data.get("architectures")
    if architectures is not None and architectures != [] and architectures != [module.ARCHITECTURE]:
        raise ConfigError(
            f"is {architectures!r}, not a causal language model of type {model_type!r}",
            file=file,
            field="architectures",
            remedy=f"supported: {module.ARCHITECTURE}",
        )
    return module.read(data, file, ignored)
