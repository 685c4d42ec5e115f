"""Which parameters of a model a full fine-tuning run trains: `--train.only`, less `--train.freeze`.

Both take whole parts of names in a row, as `--optim.lr-pattern` does: "embed_tokens", "layers.0", "layers.3.mlp". What
is left out gets no gradient node, no optimizer state and no master: it costs what it weighs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smedjan.errors import ConfigError
from smedjan.optim.base import named
from smedjan.train.config import TrainConfig

FREEZE, ONLY = "train.freeze", "train.only"


def chosen(
    names: Sequence[str], train: TrainConfig, tied: Mapping[str, str], *, grown: Sequence[str] = ()
) -> list[str]:
    """Those of `names` that are trained, in their order. `tied`: {second name: parameter} (`DecoderConfig.tied`).

    A pattern that is in no name is an error, and so is a run that trains nothing, or not what has new rows (`grown`).
    """
    found = {}
    for field, patterns in ((FREEZE, train.freeze), (ONLY, train.only)):
        for pattern in patterns or ():
            _check(pattern, names, tied, field)
        found[field] = {name for name in names if any(named(name, pattern) for pattern in patterns or ())}
    kept = [name for name in names if (train.only is None or name in found[ONLY]) and name not in found[FREEZE]]
    if not kept:
        raise ConfigError(
            "every parameter is frozen", field=FREEZE if train.freeze else ONLY, remedy="leave some to train"
        )
    for name in grown:
        if name not in kept:
            raise ConfigError(
                f"{name} is frozen, and new tokens are rows of it", field="train.new_tokens", remedy="train it"
            )
    return kept


def check_method(train: TrainConfig, method: str) -> None:
    """Adapters lie beside frozen weights: there is nothing to freeze."""
    for field, given in ((FREEZE, train.freeze), (ONLY, train.only)):
        if given is not None and method != "full":
            raise ConfigError(
                f"is for the method full, not {method}",
                field=field,
                remedy="choose what has adapters with --lora.targets and --lora.last-layers",
            )


def _check(pattern: str, names: Sequence[str], tied: Mapping[str, str], field: str) -> None:
    if any(named(name, pattern) for name in names):
        return
    for second, name in tied.items():
        if named(second, pattern):
            raise ConfigError(
                f"{pattern!r} is tied to {name} in this model",
                field=field,
                remedy=f"give {name.removesuffix('.weight').rpartition('.')[2]}, which is both",
            )
    raise ConfigError(
        f"no parameter has {pattern!r} in its name",
        field=field,
        remedy="give whole parts of names, such as embed_tokens, layers.0 or layers.3.mlp",
    )
