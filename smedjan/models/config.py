"""The strict reader of `config.json`: every key is read, known to be inert, or an error.

A dropped key is a silently different model, so `ConfigReader.finish` refuses what nobody asked for and names the
nearest key that is known. What was read, defaults filled in, is what is written again (`ConfigReader.values`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from smedjan.errors import ConfigError, SmedjanError, nearest

_MISSING = object()
_MAX_INTEGER = 2**31 - 1
"""What positions and ids are counted in on devices and in other tools."""
_MAX_NUMBER = (2 - 2**-23) * 2.0**127
"""The largest float32: what a larger number makes infinite."""

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


def parse_json(
    text: str | bytes, file: Path, error: type[SmedjanError] = ConfigError, *, field: str | None = None
) -> Any:
    """The JSON value in `text`, a part of the file called `field` if it is not the whole. A duplicate key, which the
    json module drops without a word, is refused."""

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
        value = json.loads(text, object_pairs_hook=pairs)
        # Half a surrogate pair, escaped, is no text: it could be read and never be written.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as cause:
        raise error(
            f"not valid JSON ({cause})", file=file, field=field, remedy="write the file again from its source"
        ) from cause
    return value


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


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def _is_complete(data: dict[str, Any]) -> bool:
    """Whether transformers 5 wrote the file: it writes every key that its configuration class has, older ones left out
    what was not known in their days."""
    version = data.get("transformers_version")
    return isinstance(version, str) and (found := re.match(r"\d+", version)) is not None and int(found[0]) >= 5


class ConfigReader:
    """Typed reads of one JSON object. `ignore_keys` lets unknown keys pass; it never hides a key that we read."""

    def __init__(self, data: dict[str, Any], file: Path, ignore_keys: Iterable[str] = (), prefix: str = "") -> None:
        self.data = data
        self.file = file
        self.ignore_keys = frozenset(ignore_keys)
        self.prefix = prefix
        self.values: dict[str, Any] = {}
        """Every key read, with its value or its default: a complete config.json for readers with other defaults."""
        self.defaults: dict[str, Any] = {}
        """The keys that are not in the file, with the values that were taken for them."""
        self.complete = _is_complete(data)
        self._optional: set[str] = set()
        self._known: set[str] = set()

    def error(self, message: str, field: str, remedy: str) -> ConfigError:
        return ConfigError(message, file=self.file, field=self.prefix + field, remedy=remedy)

    def has(self, name: str) -> bool:
        """Whether the key is there and not null."""
        return self.data.get(name) is not None

    def absent(self, name: str, default: Any) -> None:
        """Take `default` for a key that is not there, unless the file is of a kind that has every key."""
        if self.complete and name not in self._optional:
            raise self.error(
                f"is missing, and transformers {self.data.get('transformers_version', 5)}, which wrote this, writes it",
                name,
                f"get the file again, or add it ({json.dumps(default)} is the default)",
            )
        self.defaults[self.prefix + name] = default

    def optional(self, *names: str) -> None:
        """Keys that a complete file may lack too."""
        self._optional.update(names)

    def inert(self, *names: str) -> None:
        """Keys that do not change what the model computes."""
        self._known.update(names)

    def _read(self, name: str, default: Any) -> Any:
        self._known.add(name)
        value = self.data.get(name, _MISSING)
        if value is _MISSING:
            if default is _MISSING:
                raise self.error("is missing", name, "add it: it has no default")
            self.absent(name, default)
            value = default
        self.values[name] = value
        return value

    def integer(self, name: str, default: Any = _MISSING, *, low: int = 0, high: int | None = None) -> int:
        """An integer in [low, high], below 2^31 in any case. A bool or a float is not one."""
        high = _MAX_INTEGER if high is None else high
        value = self._read(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"is {value!r}, not an integer", name, "give a whole number")
        if not low <= value <= high:
            bounds = f"at least {low}" if value < low and high == _MAX_INTEGER else f"between {low} and {high}"
            raise self.error(f"is {_short(value)}", name, f"give an integer {bounds}")
        return value

    def optional_integer(
        self, name: str, default: int | None = None, *, low: int = 0, high: int | None = None
    ) -> int | None:
        """An integer in [low, high], or null."""
        if self._read(name, default) is None:
            return None
        return self.integer(name, default, low=low, high=high)

    def number(self, name: str, default: Any = _MISSING, *, low: float = 0.0, open_low: bool = False) -> float:
        """A number >= low (> low where `open_low`) that float32 has. An integer is one, a bool is not."""
        value = self._read(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"is {value!r}, not a number", name, "give a number")
        if not low <= value <= _MAX_NUMBER or (open_low and value == low):
            bound = f"{'above' if open_low else 'at least'} {low:g}"
            raise self.error(f"is {_short(value)}", name, f"give a finite number {bound}, in float32's range")
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
        self._known.add(name)
        value = self.data.get(name, allowed[0])
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed):
            raise self.error(f"is {value!r}, which is not supported", name, remedy)

    def optional_number(self, name: str, *, low: float = 0.0, open_low: bool = False) -> float | None:
        """A finite number >= low, or null."""
        if self._read(name, None) is None:
            return None
        return self.number(name, low=low, open_low=open_low)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above zero."""
        value = self._read(name, _MISSING)
        sound = isinstance(value, list) and len(value) == count
        if not sound or not all(type(x) in (int, float) and 0 < x <= _MAX_NUMBER for x in value):
            raise self.error(f"is {_short(value)}", name, f"give a list of {count} finite numbers above 0")
        return tuple(float(x) for x in value)

    def choices(self, name: str, options: Collection[Any], count: int) -> tuple[Any, ...] | None:
        """A list of `count` values out of `options`, or None where it is null or absent."""
        self._known.add(name)
        value = self.data.get(name)
        if value is None:
            self.absent(name, None)
            return None
        if not isinstance(value, list) or len(value) != count:
            raise self.error(f"is {_short(value)}", name, f"give a list of {count}, one for each layer")
        for item in value:
            if not any(item == option and type(item) is type(option) for option in options):
                raise self.error(f"holds {item!r}", name, f"supported: {', '.join(map(str, options))}")
        self.values[name] = value
        return tuple(value)

    def table(self, name: str) -> ConfigReader | None:
        """The nested object under `name`, or None where it is null or absent. The caller finishes it."""
        self._known.add(name)
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(f"is {value!r}, not an object", name, "give an object {...} or null")
        nested = {key.removeprefix(f"{name}.") for key in self.ignore_keys if key.startswith(f"{name}.")}
        inner = ConfigReader(value, self.file, nested, prefix=f"{self.prefix}{name}.")
        inner.complete, inner.defaults = self.complete, self.defaults
        return inner

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
