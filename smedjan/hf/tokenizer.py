"""A model directory's tokenizer, through the `tokenizers` library alone: `tokenizer.json` and the names around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from smedjan.errors import TokenizerError
from smedjan.models.config import parse_json, read_json_object


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to ids and back.

    `eos_token_ids` are all ids that end a turn: the tokenizer's own and generation_config.json's. `chat_template` is
    Jinja source.
    """

    path: Path
    backend: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and where each came from in `text`, in characters."""
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer in `directory`; a file that is missing or damaged is a TokenizerError that names it."""
    directory = Path(directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(
            "is missing",
            file=file,
            remedy="write one: transformers.AutoTokenizer.from_pretrained(SOURCE).save_pretrained(DIR)",
        )
    backend = _backend(file)
    config = _optional(directory / "tokenizer_config.json")
    special = _optional(directory / "special_tokens_map.json")
    names: dict[str, str | None] = {}
    ids: dict[str, int | None] = {}
    for key in ("bos", "eos", "pad"):
        name = _content(config.get(f"{key}_token", special.get(f"{key}_token")), directory, f"{key}_token")
        token_id = None if name is None else backend.token_to_id(name)
        if name is not None and token_id is None:
            raise TokenizerError(
                f"{name!r} is not in the vocabulary",
                file=directory / "tokenizer_config.json",
                field=f"{key}_token",
                remedy="name a token of tokenizer.json",
            )
        names[key], ids[key] = name, token_id
    return Tokenizer(
        path=directory,
        backend=backend,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        eos_token_ids=_eos_token_ids(directory, ids["eos"]),
        bos_token=names["bos"],
        eos_token=names["eos"],
        pad_token=names["pad"],
        chat_template=_chat_template(directory, config),
    )


def _backend(file: Path) -> tokenizers.Tokenizer:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise TokenizerError(f"cannot be read: {cause}", file=file, remedy="download the file again") from cause
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as cause:
        # The library raises the bare class, so nothing narrower can be caught; anything else is not its error.
        if type(cause) is not Exception:
            raise
        parse_json(text, file, TokenizerError)
        raise TokenizerError(f"is no tokenizer: {cause}", file=file, remedy="download the file again") from cause
    # Some files carry the padding and truncation of the run that saved them.
    backend.no_padding()
    backend.no_truncation()
    return backend


def _optional(file: Path) -> dict[str, Any]:
    return read_json_object(file, TokenizerError) if file.is_file() else {}


def _content(token: Any, directory: Path, field: str) -> str | None:
    """A token written as a string, as an AddedToken object, or as null."""
    if isinstance(token, dict):
        token = token.get("content")
    if token is None or isinstance(token, str):
        return token
    raise TokenizerError(
        f"is {token!r}, not a token", file=directory / "tokenizer_config.json", field=field, remedy="give a string"
    )


def _eos_token_ids(directory: Path, own: int | None) -> tuple[int, ...]:
    found: list[int] = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        value = _optional(file).get("eos_token_id")
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is int and item >= 0 for item in items):
            raise TokenizerError(f"is {value!r}", file=file, field="eos_token_id", remedy="give a token id, or a list")
        found.extend(items)
        # config.json speaks only where generation_config.json is silent, as in transformers.
        break
    return tuple(dict.fromkeys(found))


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja goes before tokenizer_config.json's, as in transformers; of several, `default`."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    legacy = _optional(directory / "chat_template.json").get("chat_template")
    template = config.get("chat_template", legacy)
    if isinstance(template, list):
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    if template is None or isinstance(template, str):
        return template
    raise TokenizerError(
        f"is a {type(template).__name__}, not a string",
        file=directory / "tokenizer_config.json",
        field="chat_template",
        remedy="give Jinja source",
    )
