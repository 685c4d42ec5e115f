"""A model directory's tokenizer, through the `tokenizers` library alone: `tokenizer.json` and the names around it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import tokenizers

from smedjan.data.chat_template import Span, render
from smedjan.errors import TokenizerError
from smedjan.hf.tokenizer_classes import (
    SPECIAL_TOKENS,
    TOKENIZER_CLASSES,
    TokenizerClass,
    class_name,
    named_tokens,
    optional_json,
    token_content,
)
from smedjan.models.config import parse_json


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to ids and back.

    `eos_token_ids` are all ids that end a turn: the tokenizer's own and generation_config.json's. `chat_template` is
    Jinja source: of several `chat_templates` by name, `default`. `special_tokens` are those of tokenizer_config.json by
    their key (`bos_token`, ...), which templates see.
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
    unk_token_id: int | None = None
    unk_token: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)

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

    def fingerprint(self) -> str:
        """sha256 of all that decides ids and rendered text, the library's version too."""
        names = (self.bos_token, self.eos_token, self.eos_token_ids, self.chat_template)
        return sha256(json.dumps([tokenizers.__version__, self.backend.to_str(), *names]).encode()).hexdigest()

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def template_for(self, tools: Sequence[Any] | None = None, name: str | None = None) -> str:
        """The template called `name`, else `tool_use` where there are tools and such a template, else `default`."""
        wanted = name or ("tool_use" if tools is not None and "tool_use" in self.chat_templates else "default")
        if wanted in self.chat_templates:
            return self.chat_templates[wanted]
        known = ", ".join(sorted(self.chat_templates))
        raise TokenizerError(
            f"there is no chat template {wanted!r}" + (f", only {known}" if known else ""),
            file=self.path,
            field="chat_template",
            remedy="name one of them" if known else "use an instruct model, or add chat_template.jinja to it",
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        now: datetime | None = None,
        **kw: Any,
    ) -> tuple[str, list[Span]]:
        """The text of a conversation as transformers renders it, and its `{% generation %}` spans.

        `chat_template` is the name of one of several. The text holds its special tokens: encode it without adding any.
        """
        variables = {**self.special_tokens, **kw}
        return render(
            self.template_for(tools, chat_template),
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            bos_token=variables.pop("bos_token", None),
            eos_token=variables.pop("eos_token", None),
            now=now,
            **variables,
        )


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
    config = optional_json(directory / "tokenizer_config.json")
    names = _special_tokens(directory, config, backend)
    ids = {key: None if token is None else backend.token_to_id(token) for key, token in names.items()}
    for key in ("bos_token", "eos_token", "pad_token"):
        if names[key] is not None and ids[key] is None:
            raise TokenizerError(
                f"{names[key]!r} is not in the vocabulary",
                file=directory / "tokenizer_config.json",
                field=key,
                remedy="name a token of tokenizer.json",
            )
    templates = _chat_templates(directory, config)
    return Tokenizer(
        path=directory,
        backend=backend,
        bos_token_id=ids["bos_token"],
        eos_token_id=ids["eos_token"],
        pad_token_id=ids["pad_token"],
        unk_token_id=ids["unk_token"],
        eos_token_ids=_eos_token_ids(directory, ids["eos_token"]),
        bos_token=names["bos_token"],
        eos_token=names["eos_token"],
        pad_token=names["pad_token"],
        unk_token=names["unk_token"],
        chat_template=templates.get("default"),
        chat_templates=templates,
        special_tokens={key: token for key, token in names.items() if token is not None},
    )


def _special_tokens(directory: Path, config: dict[str, Any], backend: tokenizers.Tokenizer) -> dict[str, str | None]:
    """Every `..._token` that the directory names, and those of its tokenizer class where it is silent."""
    file = directory / "tokenizer_config.json"
    given = {name: token_content(token, file, name) for name, token in named_tokens(directory, config).items()}
    # The first conversions of Llama name them "", which is no token.
    names = {name: token or None for name, token in given.items()}
    implied = TOKENIZER_CLASSES.get(class_name(directory, config) or "", TokenizerClass()).specials
    for name in SPECIAL_TOKENS:
        default = implied.get(name)
        names.setdefault(name, default if default is not None and backend.token_to_id(default) is not None else None)
    own = {key: token for key, token in config.items() if key.endswith("_token") and isinstance(token, str)}
    return {**own, **names}


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


def _eos_token_ids(directory: Path, own: int | None) -> tuple[int, ...]:
    found: list[int] = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        value = optional_json(file).get("eos_token_id")
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is int and item >= 0 for item in items):
            raise TokenizerError(f"is {value!r}", file=file, field="eos_token_id", remedy="give a token id, or a list")
        found.extend(items)
        # config.json speaks only where generation_config.json is silent, as in transformers.
        break
    return tuple(dict.fromkeys(found))


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files go before tokenizer_config.json, and that before chat_template.json."""
    files = {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: _read_template(file) for name, file in files.items()}
    for source, data in (
        (directory / "tokenizer_config.json", config),
        (directory / "chat_template.json", optional_json(directory / "chat_template.json")),
    ):
        if (found := data.get("chat_template")) is not None:
            return _named_templates(found, source)
    return {}


def _read_template(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise TokenizerError(f"cannot be read: {cause}", file=file, remedy="download the file again") from cause


def _named_templates(found: Any, file: Path) -> dict[str, str]:
    """The inline forms: Jinja source, a list of {name, template}, or {name: template}."""
    if isinstance(found, str):
        return {"default": found}
    pairs: list[tuple[Any, Any]] = []
    if isinstance(found, dict):
        pairs = list(found.items())
    elif isinstance(found, list) and all(isinstance(item, dict) for item in found):
        pairs = [(item.get("name"), item.get("template")) for item in found]
    if not pairs or not all(isinstance(name, str) and isinstance(template, str) for name, template in pairs):
        raise TokenizerError(
            f"is of type {type(found).__name__}, neither Jinja source nor named templates",
            file=file,
            field="chat_template",
            remedy="give a string, or [{name, template}, ...]",
        )
    return dict(pairs)
