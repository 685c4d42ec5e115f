"""The strict reader of `config.json`: every key is read, known to be inert, or an error.

A dropped key is a silently different model, so `ConfigReader.finish` refuses what nobody asked for and names the
nearest key that is known. RoPE is spelt in two ways (`rope_theta` + `rope_scaling`, and transformers 5's
`rope_parameters`): both are read, a contradiction between them is an error, and both are written.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from smedjan.errors import ConfigError, SmedjanError, nearest

_MISSING = object()

ROPE_TYPES = ("default", "linear", "llama3")
"""The scalings of rotary positions that the `rope` op computes."""


HF_INERT = """
    _attn_implementation _commit_hash _name_or_path architectures attn_implementation auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id
    length_penalty max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
""".split()  # noqa: SIM905
"""Bookkeeping, initialisation, and sampling defaults that transformers once kept here: none enters the computation."""


def parse_json(text: str | bytes, file: Path, error: type[SmedjanError] = ConfigError) -> Any:
    """The JSON value in `text`; a duplicate key, which the json module drops without a word, is refused."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise error(
                    f"the key {key!r} stands there twice", file=file, field=key, remedy="keep one of the two values"
                )
            seen[key] = value
        return seen

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as cause:
        raise error(f"not valid JSON ({cause})", file=file, remedy="write the file again from its source") from cause


def read_json_object(file: Path, error: type[SmedjanError] = ConfigError) -> dict[str, Any]:
    """The JSON object in `file`."""
    try:
        text = file.read_bytes()
    except OSError as cause:
        raise error(f"cannot be read: {cause.strerror}", file=file, remedy="check the path and its rights") from cause
    value = parse_json(text, file, error)
    if not isinstance(value, dict):
        raise error(f"holds a JSON {type(value).__name__}, not an object", file=file, remedy="give an object {...}")
    return value


class ConfigReader:
    """Typed reads of one JSON object. `ignore_keys` lets unknown keys pass; it never hides a key that we read."""

    def __init__(self, data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = (), prefix: str = "") -> None:
        self.data = data
        self.file = file
        self.ignore_keys = frozenset(ignore_keys)
        self.prefix = prefix
        self._known: set[str] = set()

    def error(self, message: str, field: str, remedy: str) -> ConfigError:
        return ConfigError(message, file=self.file, field=self.prefix + field, remedy=remedy)

    def has(self, name: str) -> bool:
        """Whether the key is there and not null."""
        return self.data.get(name) is not None

    def inert(self, *names: str) -> None:
        """Keys that do not change what the model computes."""
        self._known.update(names)

    def _read(self, name: str, default: Any) -> Any:
        self._known.add(name)
        value = self.data.get(name, _MISSING)
        if value is _MISSING:
            if default is _MISSING:
                raise self.error("is missing", name, "add it: it has no default")
            return default
        return value

    def integer(self, name: str, default: Any = _MISSING, *, low: int = 0, high: int | None = None) -> int:
        """An integer in [low, high]. A bool or a float is not one."""
        value = self._read(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"is {value!r}, not an integer", name, "give a whole number")
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise self.error(f"is {value}", name, f"give an integer {bounds}")
        return value

    def optional_integer(
        self, name: str, default: int | None = None, *, low: int = 0, high: int | None = None
    ) -> int | None:
        """An integer in [low, high], or null."""
        if self._read(name, default) is None:
            return None
        return self.integer(name, default, low=low, high=high)

    def number(self, name: str, default: Any = _MISSING, *, low: float = 0.0, open_low: bool = False) -> float:
        """A finite number >= low (> low where `open_low`). An integer is one, a bool is not."""
        value = self._read(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"is {value!r}, not a number", name, "give a number")
        if not isfinite(value) or value < low or (open_low and value == low):
            raise self.error(f"is {value}", name, f"give a finite number {'above' if open_low else 'at least'} {low:g}")
        return float(value)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        value = self._read(name, default)
        if not isinstance(value, bool):
            raise self.error(f"is {value!r}, not true or false", name, "give true or false")
        return value

    def text(self, name: str, default: Any = _MISSING) -> str:
        value = self._read(name, default)
        if not isinstance(value, str):
            raise self.error(f"is {value!r}, not a string", name, "give a string")
        return value

    def choice(self, name: str, options: Collection[str], default: Any = _MISSING) -> str:
        value = self.text(name, default)
        if value not in options:
            close = nearest(value, set(options))
            hint = f"did you mean {close!r}? " if close else ""
            raise self.error(f"is {value!r}", name, f"{hint}supported: {', '.join(sorted(options))}")
        return value

    def only(self, name: str, *allowed: Any, remedy: str) -> None:
        """A key that may be there as long as it says what we compute anyway. True is not 1 here."""
        value = self._read(name, allowed[0])
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed):
            raise self.error(f"is {value!r}, which is not supported", name, remedy)

    def table(self, name: str) -> ConfigReader | None:
        """The nested object under `name`, or None where it is null or absent. The caller finishes it."""
        value = self._read(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(f"is {value!r}, not an object", name, "give an object {...} or null")
        nested = {key.removeprefix(f"{name}.") for key in self.ignore_keys if key.startswith(f"{name}.")}
        return ConfigReader(value, self.file, nested, prefix=f"{self.prefix}{name}.")

    def contradiction(self, left: str, right: str, message: str, remedy: str) -> ConfigError:
        """Two keys that cannot both be right."""
        return self.error(message, f"{self.prefix}{left} and {self.prefix}{right}".removeprefix(self.prefix), remedy)

    def finish(self) -> None:
        """Refuse the first key that was neither read nor declared inert."""
        for key in self.data:
            if key in self._known or key in self.ignore_keys:
                continue
            close = nearest(key, self._known)
            hint = f"did you mean {close!r}? " if close else ""
            raise self.error(
                "is not known, and an unknown key may change the model",
                key,
                f"{hint}if it does not matter, pass --ignore-key {self.prefix}{key}",
            )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: angle(p, i) = p * f_i, f_i = rope_theta^(-2i / head_dim), scaled by `rope_type`.

    linear: f_i / factor. llama3: f_i / factor for wavelengths 2 pi / f_i above original / low_freq_factor, f_i below
    original / high_freq_factor, interpolated between. Fields that the type does not use are None.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


def read_rope(reader: ConfigReader, max_position_embeddings: int, default_theta: float = 10000.0) -> RopeConfig:
    """Rotary positions from either spelling, or from both where they agree."""
    theta = reader.number("rope_theta", low=0.0, open_low=True) if reader.has("rope_theta") else None
    reader.inert("rope_theta")
    original = reader.optional_integer("original_max_position_embeddings", low=1)
    reader.only("partial_rotary_factor", None, 1, remedy="only models that rotate the whole head are supported")
    found: dict[str, RopeConfig] = {}
    for name in ("rope_scaling", "rope_parameters"):
        table = reader.table(name)
        if table is not None:
            found[name] = _read_rope_table(table, theta, original, max_position_embeddings, default_theta)
            if theta is not None and found[name].rope_theta != theta:
                raise reader.contradiction(
                    "rope_theta", f"{name}.rope_theta", f"are {theta:g} and {found[name].rope_theta:g}", "keep one"
                )
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        # rope_scaling seldom carries its own rope_theta: it then stands under rope_parameters alone.
        old, new = found["rope_scaling"], found["rope_parameters"]
        for field in RopeConfig.__dataclass_fields__:
            left, right = getattr(old, field), getattr(new, field)
            inherited = field == "rope_theta" and theta is None and "rope_theta" not in reader.data["rope_scaling"]
            if left != right and not inherited:
                raise reader.contradiction(
                    f"rope_scaling.{field}", f"rope_parameters.{field}", f"are {left!r} and {right!r}", "keep one"
                )
    if found:
        return found.get("rope_parameters") or found["rope_scaling"]
    return RopeConfig(rope_theta=theta if theta is not None else default_theta)


def _read_rope_table(
    table: ConfigReader, theta: float | None, original: int | None, max_positions: int, default_theta: float
) -> RopeConfig:
    table.inert("rope_type", "type", "rope_theta")
    kinds = [table.choice(name, ROPE_TYPES) for name in ("rope_type", "type") if table.has(name)]
    if len(set(kinds)) == 2:
        raise table.contradiction("rope_type", "type", f"are {kinds[0]!r} and {kinds[1]!r}", "keep one")
    kind = kinds[0] if kinds else "default"
    table.only("partial_rotary_factor", None, 1, remedy="only models that rotate the whole head are supported")
    fields: dict[str, Any] = {"rope_type": kind, "rope_theta": theta if theta is not None else default_theta}
    if table.has("rope_theta"):
        fields["rope_theta"] = table.number("rope_theta", low=0.0, open_low=True)
    if kind != "default":
        fields["factor"] = table.number("factor", low=0.0, open_low=True)
    if kind == "llama3":
        fields["low_freq_factor"] = table.number("low_freq_factor", low=0.0, open_low=True)
        fields["high_freq_factor"] = table.number("high_freq_factor", low=0.0, open_low=True)
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise table.contradiction(
                "low_freq_factor",
                "high_freq_factor",
                f"are {fields['low_freq_factor']:g} and {fields['high_freq_factor']:g}",
                "the high one must be the larger",
            )
        inner = table.optional_integer("original_max_position_embeddings", low=1)
        if inner is not None and original is not None and inner != original:
            raise ConfigError(
                f"are {original} and {inner}",
                file=table.file,
                field=f"original_max_position_embeddings and {table.prefix}original_max_position_embeddings",
                remedy="keep one",
            )
        fields["original_max_position_embeddings"] = inner or original or max_positions
    table.finish()
    return RopeConfig(**fields)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The keys of `config.json` in both spellings: `rope_theta`, `rope_scaling` and `rope_parameters`."""
    scaling = {
        name: value
        for name, value in (
            ("factor", rope.factor),
            ("low_freq_factor", rope.low_freq_factor),
            ("high_freq_factor", rope.high_freq_factor),
            ("original_max_position_embeddings", rope.original_max_position_embeddings),
        )
        if value is not None
    }
    return {
        "rope_theta": rope.rope_theta,
        # transformers before 4.43 and mlx-lm look for `type`, later ones for `rope_type`.
        "rope_scaling": (
            None if rope.rope_type == "default" else {"type": rope.rope_type, "rope_type": rope.rope_type, **scaling}
        ),
        "rope_parameters": {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta, **scaling},
    }
