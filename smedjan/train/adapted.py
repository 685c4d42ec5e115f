"""The adapters that a run's flags ask for, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping

from smedjan.errors import ConfigError
from smedjan.models.decoder_config import DecoderConfig
from smedjan.passes.lora import Lora
from smedjan.train.config import LoraConfig


def adapters(lora: LoraConfig, model: DecoderConfig, parameters: Mapping[str, tuple[int, ...]]) -> Lora:
    """Beside `parameters`, {name: shape} of the model's. ConfigError where a flag names what takes no adapter."""
    made = Lora(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets or model.linear_layers(),
        layers=_layers(lora.last_layers, model.num_hidden_layers),
        transposed=model.conv1d,
        ranks=lora.ranks,
        alphas=lora.alphas,
        rslora=lora.rslora,
        dora=lora.dora,
    )
    shapes = made.shapes(parameters)
    for module in (model.names.embedding, model.names.head):
        if made.matches(module):
            raise ConfigError(
                f"{module!r} takes no adapter",
                field="lora.targets",
                remedy="name linear layers of the blocks, such as q_proj",
            )
    for target in made.targets:
        if not any(f".{target}.lora_A" in name for name in shapes):
            raise ConfigError(
                f"no module is called {target!r}", field="lora.targets", remedy="see smedjan graph for the names"
            )
    for field, pairs in (("lora.rank_pattern", lora.ranks), ("lora.alpha_pattern", lora.alphas)):
        for name, _ in pairs:
            if not any(f".{name}.lora_A" in adapter for adapter in shapes):
                raise ConfigError(
                    f"no module with an adapter is called {name!r}",
                    field=field,
                    remedy="see smedjan graph for the names, and --lora.targets",
                )
    return made


def _layers(last: int | None, count: int) -> tuple[int, ...] | None:
    if last is None:
        return None
    if last > count:
        raise ConfigError(
            f"{last} is more than the model's {count} layers",
            field="lora.last_layers",
            remedy=f"give --lora.last-layers {count} or less",
        )
    return tuple(range(count - last, count))
