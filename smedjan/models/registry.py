"""Which `model_type`s there are, and the one way from a `config.json` to a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from smedjan.errors import ConfigError, nearest
from smedjan.models import (
    arcee,
    cohere,
    cohere2,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3_text,
    glm,
    glm4,
    gpt2,
    gpt_neox,
    granite,
    helium,
    llama,
    ministral,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    vaultgemma,
)
from smedjan.models.decoder_config import DecoderConfig

ARCHITECTURES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        llama,
        mistral,
        ministral,
        qwen2,
        qwen3,
        gemma,
        gemma2,
        gemma3_text,
        phi3,
        granite,
        smollm3,
        olmo2,
        olmo3,
        starcoder2,
        cohere2,
        stablelm,
        gpt_neox,
        gpt2,
        arcee,
        seed_oss,
        cohere,
        ernie4_5,
        exaone4,
        glm,
        glm4,
        helium,
        vaultgemma,
    )
}
"""HF `model_type`, which is the module's name -> the module with ARCHITECTURE and read."""


def read_config(data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = ()) -> DecoderConfig:
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
                remedy="import the unquantized model, one in MLX's affine format, or a .gguf file",
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
