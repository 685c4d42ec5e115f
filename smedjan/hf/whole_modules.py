"""Embeddings and heads that an adapter holds whole, beside its low-rank ones: PEFT's `modules_to_save`.

The file has them as `base_model.model.NAME`. A vocabulary that grew is theirs: the model that they are laid over takes
its size from them. Where the base's head is tied to its embeddings, PEFT keeps it so with `ensure_weight_tying` alone;
without, its head stays the base's while the embeddings move away, and so the result here is an untied model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smedjan.checkpoint.raw import LazyTensor, LazyTensors, RawTensor
from smedjan.errors import CheckpointError, ConfigError
from smedjan.models.config import read_json_object
from smedjan.models.decoder_config import DecoderConfig
from smedjan.passes.lora import is_named

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"


def parameters_named(modules: tuple[str, ...], config: DecoderConfig, field: str) -> tuple[str, ...]:
    """The weights of those modules, in the model's order: the embedding, the head (of a tied one, the embedding)."""
    allowed = {config.names.embedding: config.embedding, config.names.head: config.head}
    found = set()
    for module in modules:
        name = next((weight for full, weight in allowed.items() if is_named(full, module)), None)
        if name is None:
            raise ConfigError(
                f"{module!r} is neither the embedding nor the head",
                field=field,
                remedy=f"give {' or '.join(full.rpartition('.')[2] for full in allowed)}",
            )
        found.add(name)
    return tuple(name for name in dict.fromkeys((config.embedding, config.head)) if name in found)


def saved_names(adapter: Path) -> tuple[tuple[str, ...], bool]:
    """(modules_to_save, ensure_weight_tying) of an adapter's config."""
    file = adapter / CONFIG
    data = read_json_object(file)
    modules = data.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ConfigError(f"is {modules!r}", file=file, field="modules_to_save", remedy="list names of modules")
    return tuple(modules), data.get("ensure_weight_tying") is True


def laid_over(
    data: Mapping[str, Any],
    config: DecoderConfig,
    base: Mapping[str, RawTensor],
    adapter: Path,
    held: Mapping[str, RawTensor],
) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """(config.json, the tensors that replace or join the base's) of a model under the adapter's whole modules.

    `held` are the adapter's tensors.
    """
    modules, tying = saved_names(adapter)
    try:
        names = parameters_named(modules, config, "modules_to_save")
    except ConfigError as error:
        raise ConfigError(error.message, file=adapter / CONFIG, field=error.field, remedy=error.remedy) from error
    if not names:
        return dict(data), {}
    head = f"{config.names.head}.weight"
    # A head that was resized, not trained, is in the file too.
    resized = (head,) if not config.tie_word_embeddings and PREFIX + head in held else ()
    made = {name: _held(held, name, adapter) for name in dict.fromkeys((*names, *resized))}
    vocab = next(iter(made.values())).shape[0]
    changes: dict[str, Any] = {"vocab_size": vocab}
    if config.tie_word_embeddings and not tying:
        separate = any(is_named(config.names.head, module) for module in modules)
        made[head] = _head_left_behind(held, base[config.embedding], config, adapter, vocab, saved=separate)
        changes["tie_word_embeddings"] = False
    return {**data, **changes}, made


def _held(held: Mapping[str, RawTensor], name: str, adapter: Path) -> RawTensor:
    if PREFIX + name not in held:
        raise CheckpointError(
            "is in modules_to_save, and missing", file=adapter, field=PREFIX + name, remedy="save it with PEFT again"
        )
    return held[PREFIX + name]


def _head_left_behind(
    held: Mapping[str, RawTensor],
    embedding: RawTensor,
    config: DecoderConfig,
    adapter: Path,
    vocab: int,
    *,
    saved: bool,
) -> RawTensor:
    """The head of a tied base whose embeddings alone were trained: the base's, of new rows what PEFT saved of it."""
    head = f"{config.names.head}.weight"
    if saved or PREFIX + head in held:
        return _held(held, head, adapter)
    if embedding.shape[0] != vocab:
        raise CheckpointError(
            f"the head of {vocab} tokens is missing: the base has {embedding.shape[0]}",
            file=adapter,
            field=PREFIX + head,
            remedy="save the adapter with ensure_weight_tying, or with lm_head in modules_to_save",
        )
    return embedding


def replaced(base: Mapping[str, RawTensor], changed: Mapping[str, RawTensor], file: Path) -> LazyTensors:
    """`base` with some tensors in the place of its own, or behind them; the others are read when asked."""
    entries = dict(base.entries) if isinstance(base, LazyTensors) else {name: _entry(base, name, file) for name in base}
    entries |= {name: _entry(changed, name, file) for name in changed}
    return LazyTensors(entries)


def _entry(tensors: Mapping[str, RawTensor], name: str, file: Path) -> LazyTensor:
    tensor = tensors[name]
    return LazyTensor(spec=tensor.spec, load=lambda: tensor, file=file)
