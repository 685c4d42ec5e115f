"""The keys of `config.json` that most families share, read strictly, each with its family's default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smedjan.models.config import HF_INERT, ConfigReader
from smedjan.models.decoder_config import DecoderConfig, Layer
from smedjan.models.rope import RopeConfig, RopeKeys, read_rope, write_rope
from smedjan.ops.activation import ACTIVATIONS

LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_LAYERS = 10_000
"""More are a damaged number, of which nothing is to be made: not even the list of the tensors that it would want."""


def start(data: dict[str, Any], file: Path, ignore_keys: Iterable[str]) -> ConfigReader:
    """A reader that passes over the bookkeeping which every config carries."""
    reader = ConfigReader(data, file, ignore_keys)
    reader.inert(*HF_INERT)
    return reader


def read_sizes(
    reader: ConfigReader,
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    max_position_embeddings: int,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    derived_head_dim: bool = False,
    whole_heads: bool = False,
) -> dict[str, Any]:
    """The dims, each parameter being the family's default; None means A for K and H / A for D.

    derived_head_dim: the family knows no other D than H / A. whole_heads: A must divide H even where D is given, since
    transformers refuses such a configuration: nothing could read what we save.
    """
    made: dict[str, Any] = {
        "vocab_size": reader.integer("vocab_size", vocab_size, low=1),
        "hidden_size": reader.integer("hidden_size", hidden_size, low=1),
        "intermediate_size": reader.integer("intermediate_size", intermediate_size, low=1),
        "num_hidden_layers": reader.integer("num_hidden_layers", num_hidden_layers, low=1, high=MAX_LAYERS),
        "num_attention_heads": reader.integer("num_attention_heads", num_attention_heads, low=1),
        "max_position_embeddings": reader.integer("max_position_embeddings", max_position_embeddings, low=1),
    }
    heads = made["num_attention_heads"]
    kv_heads = reader.optional_integer("num_key_value_heads", num_key_value_heads, low=1) or heads
    if heads % kv_heads:
        raise reader.contradiction(
            "num_attention_heads",
            "num_key_value_heads",
            f"are {heads} and {kv_heads}",
            "the second divides the first",
        )
    made["num_key_value_heads"] = reader.values["num_key_value_heads"] = kv_heads
    made["head_dim"] = read_head_dim(
        reader, made["hidden_size"], heads, head_dim, derived=derived_head_dim, whole=whole_heads
    )
    return made


def read_head_dim(
    reader: ConfigReader, hidden_size: int, heads: int, default: int | None, *, derived: bool, whole: bool
) -> int:
    """D, under `head_dim` or H / A; even, since rotary positions turn pairs."""
    if derived:
        given = reader.data.get("head_dim")
        reader.only("head_dim", None, hidden_size // heads, remedy=f"models of this type have {hidden_size // heads}")
        head_dim = None
    else:
        given = reader.optional_integer("head_dim", default, low=1)
        head_dim = given
    if hidden_size % heads and (whole or head_dim is None):
        raise reader.contradiction(
            "hidden_size",
            "num_attention_heads",
            f"are {hidden_size} and {heads}",
            "hidden_size must be a multiple of num_attention_heads",
        )
    head_dim = head_dim or hidden_size // heads
    if not derived:
        reader.values["head_dim"] = head_dim
    if head_dim % 2:
        raise reader.error(
            f"is {head_dim} and rotary positions turn pairs",
            "head_dim" if given is not None else "hidden_size / num_attention_heads",
            "it must be even",
        )
    return head_dim


def read_tokens(
    reader: ConfigReader,
    vocab_size: int,
    *,
    bos: int | None,
    eos: int | tuple[int, ...] | None,
    pad: int | None,
    padding: bool = True,
) -> dict[str, Any]:
    """bos, eos (one or several) and pad, which is a row of the embedding. `padding`: the family gives that row no
    gradient."""
    # An id that is null is not written.
    reader.optional(*(name for name, default in (("bos_token_id", bos), ("pad_token_id", pad)) if default is None))
    if eos is None:
        reader.optional("eos_token_id")
    if "eos_token_id" not in reader.data:
        reader.absent("eos_token_id", eos)
    ends = reader.data.get("eos_token_id", eos)
    if isinstance(ends, list | tuple):
        reader.inert("eos_token_id")
        for item in ends:
            if "eos_token_id" in reader.data and (type(item) is not int or not item >= 0):
                raise reader.error(f"holds {item!r}", "eos_token_id", f"give ids between 0 and {vocab_size - 1}")
        reader.values["eos_token_id"] = list(ends)
        eos_ids = tuple(ends)
    else:
        one = _token(reader, "eos_token_id", eos if isinstance(eos, int) else None)
        eos_ids = () if one is None else (one,)
    pad_id = _token(reader, "pad_token_id", pad)
    if pad_id is not None and pad_id >= vocab_size:
        where = "is" if "pad_token_id" in reader.data else "is missing, and its default"
        raise reader.error(f"{where} {pad_id}", "pad_token_id", f"give an integer between 0 and {vocab_size - 1}")
    return {
        "bos_token_id": _token(reader, "bos_token_id", bos),
        "eos_token_id": eos_ids,
        "pad_token_id": pad_id,
        "padding_idx": pad_id if padding else None,
    }


def _token(reader: ConfigReader, name: str, default: int | None) -> int | None:
    return reader.optional_integer(name, default)


def read_dropout(reader: ConfigReader, **defaults: float) -> dict[str, float]:
    """Probabilities of dropout in training, by their keys: none of it enters the computation."""
    found = {}
    for name, default in defaults.items():
        reader.inert(name)
        if name not in reader.data:
            reader.values[name] = default
        if reader.data.get(name) is None:
            continue
        found[name] = reader.number(name, default)
        if found[name] >= 1:
            raise reader.error(f"is {found[name]:g}", name, "give a probability below 1")
    return {name: p for name, p in found.items() if p}


def read_activation(reader: ConfigReader, default: str, name: str = "hidden_act") -> str:
    return reader.choice(name, tuple(ACTIVATIONS), default)


def read_cap(reader: ConfigReader, name: str, default: float | None) -> float:
    """A softcap, 0 where it is null: none."""
    if name not in reader.data:
        reader.inert(name)
        reader.absent(name, default)
        reader.values[name] = default
        return default or 0.0
    return reader.optional_number(name, open_low=True) or 0.0


def read_pattern(
    reader: ConfigReader, count: int, default: list[str], *, window: int | None, options: tuple[str, ...] = LAYER_TYPES
) -> list[str]:
    """layer_types, one for each layer; sliding attention needs a window."""
    types = list(reader.choices("layer_types", options, count) or default)
    reader.values["layer_types"] = types
    if "sliding_attention" in types and window is None:
        raise reader.contradiction(
            "layer_types", "sliding_window", "say sliding_attention and null", "give the window, in tokens"
        )
    return types


def every_nth(count: int, n: int) -> list[str]:
    """Sliding attention but in each n-th layer (n = 0: in none)."""
    return ["sliding_attention" if n == 0 or (number + 1) % n else "full_attention" for number in range(count)]


def read_every_nth(reader: ConfigReader, count: int, default: int) -> list[str]:
    """The older `sliding_window_pattern`, an integer n: each n-th layer sees everything. mlx-lm knows it alone, so that
    it is written too, where there is such an n."""
    key = "sliding_window_pattern"
    pattern = reader.integer(key, low=1) if key in reader.data else default
    reader.inert(key)
    made = every_nth(count, pattern)
    given = reader.data.get("layer_types")
    equal = (n for n in (pattern, *range(1, count + 1)) if every_nth(count, n) == (given or made))
    reader.values.pop(key, None)
    said = next(equal, None)
    if said is not None:
        reader.values[key] = said
    if key in reader.data and given is not None and given != made:
        raise reader.contradiction(key, "layer_types", f"are {pattern} and another pattern", "keep one")
    return made


def read_window(reader: ConfigReader, default: int | None) -> int | None:
    """Tokens that a sliding layer sees, the current one among them."""
    return reader.optional_integer("sliding_window", default, low=1)


def read_late_windows(reader: ConfigReader, count: int) -> tuple[int | None, list[str]]:
    """Qwen's window, where `use_sliding_window` says so, in the layers from `max_window_layers` on: (tokens, types)."""
    window = read_window(reader, 4096)
    if not reader.flag("use_sliding_window", False):
        window = None
    first = reader.integer("max_window_layers", 28)
    default = ["sliding_attention" if window and number >= first else "full_attention" for number in range(count)]
    return window, read_pattern(reader, count, default, window=window)


def causal_only(reader: ConfigReader) -> None:
    """Keys that would make a decoder something else."""
    reader.only("use_bidirectional_attention", None, False, remedy="only causal attention is supported")
    reader.only("is_causal", True, None, remedy="only causal attention is supported")
    reader.only("add_cross_attention", False, None, remedy="only decoders without cross-attention are supported")


def uniform(count: int, rope: RopeConfig | None, scale: float, window: int | None = None) -> tuple[Layer, ...]:
    return (Layer(rope=rope, scale=scale, window=window),) * count


def by_type(
    types: Sequence[str], ropes: RopeConfig | Mapping[str, RopeConfig], scale: float, window: int | None
) -> tuple[Layer, ...]:
    """A layer for each of `types`, with the window where it slides; `ropes` for all, or for each type."""
    return tuple(
        Layer(
            rope=ropes if isinstance(ropes, RopeConfig) else ropes[kind],
            scale=scale,
            window=window if kind == "sliding_attention" else None,
        )
        for kind in types
    )


def one_rope(reader: ConfigReader, sizes: dict[str, Any], keys: RopeKeys | None = None) -> RopeConfig:
    """Read, and kept to be written in both spellings."""
    rope = read_rope(reader, head_dim=sizes["head_dim"], max_positions=sizes["max_position_embeddings"], keys=keys)
    reader.values.update(write_rope(rope, keys))
    return rope


def finish(reader: ConfigReader, config: dict[str, Any]) -> DecoderConfig:
    """The configuration, once every key of the file is accounted for."""
    causal_only(reader)
    reader.finish()
    data = {"architectures": [config["architecture"]], "model_type": config["model_type"], **reader.values}
    return DecoderConfig(**config, data=data, defaults=reader.defaults)
