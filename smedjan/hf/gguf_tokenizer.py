"""The tokenizer in a GGUF file's metadata, rebuilt as `tokenizer.json` and `tokenizer_config.json`.

Byte-level BPE (`tokenizer.ggml.model` = gpt2) stores its vocabulary and merges, and its pre-tokenizer only by name:
that name must be known, since a wrong split gives wrong ids without an error. SentencePiece BPE (llama) stores scores;
its merges are every pair of pieces whose union is a piece, best score first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smedjan.errors import TokenizerError, nearest
from smedjan.hf.gguf_pre import PRE_TOKENIZERS

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """File name -> content, and what had to be assumed."""

    files: dict[str, bytes]
    notes: tuple[str, ...]


class _Metadata:
    """Checked access to `tokenizer.*`."""

    def __init__(self, data: dict[str, Any], file: Path) -> None:
        self.data, self.file = data, file
        self.tokens: list[str] = self.list_of("tokenizer.ggml.tokens", str)
        if not self.tokens:
            raise self.bad("is empty", "tokenizer.ggml.tokens")
        if len(set(self.tokens)) != len(self.tokens):
            raise self.bad("holds a token twice", "tokenizer.ggml.tokens")
        self.types: list[int] = self.list_of("tokenizer.ggml.token_type", int) or [_NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise self.bad(f"has {len(self.types)} entries for {len(self.tokens)} tokens", "tokenizer.ggml.token_type")

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, without the unused ones by which a converter fills the model's rows."""
        return {
            token: token_id
            for token_id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != _UNUSED or token != f"[PAD{token_id}]"
        }

    def bad(self, message: str, field: str, remedy: str = "import the model's HF directory instead") -> TokenizerError:
        return TokenizerError(message, file=self.file, field=field, remedy=remedy)

    def list_of(self, key: str, kind: type) -> list[Any]:
        value = self.data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.bad(f"is not a list of {kind.__name__}", key)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(f"is {value!r}, not a bool", key)
        return value

    def token(self, name: str) -> str | None:
        """The token whose id stands under `tokenizer.ggml.NAME_token_id`."""
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = self.data.get(key)
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            raise self.bad(f"is {token_id!r}, the vocabulary has {len(self.tokens)} tokens", key)
        return self.tokens[token_id]

    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens that are cut out of the text before anything else: special ones and user-defined ones."""
        return [
            {
                "id": token_id,
                "content": self.tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for token_id, kind in enumerate(self.types)
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) and self.tokens[token_id]
        ]


def tokenizer_from_gguf(metadata: dict[str, Any], file: Path) -> TokenizerFiles:
    """`tokenizer.json` and `tokenizer_config.json`, with the chat template, for the GGUF metadata of `file`."""
    data = _Metadata(metadata, file)
    kind = metadata.get("tokenizer.ggml.model")
    notes: list[str] = []
    if kind == "gpt2":
        parts, adds_bos = _byte_level_bpe(data, notes)
    elif kind == "llama":
        parts, adds_bos = _sentencepiece_bpe(data), True
    else:
        raise data.bad(f"{kind!r} is not supported", "tokenizer.ggml.model")
    adds_bos = data.flag("tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = data.flag("tokenizer.ggml.add_eos_token", False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": data.added_tokens(),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _template(data, adds_bos, adds_eos) or parts["post_processor"],
        "decoder": parts["decoder"],
        "model": parts["model"],
    }
    config: dict[str, Any] = {
        # Every other class rebuilds its own pre-tokenizer in transformers 5 and drops the one of tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "added_tokens_decoder": {
            str(added["id"]): {key: value for key, value in added.items() if key != "id"}
            for added in tokenizer["added_tokens"]
        },
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (token := data.token(name)) is not None:
            config[f"{key}_token"] = token
    if config.get("pad_token") is not None and config.get("pad_token") == config.get("eos_token"):
        notes.append(f"{config['pad_token']} both pads and ends: padding must be masked by position, never by id")
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    if (template := _chat_template(data)) is not None:
        config["chat_template"] = template
    files = {"tokenizer.json": _json(tokenizer), "tokenizer_config.json": _json(config)}
    return TokenizerFiles(files=files, notes=tuple(notes))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _byte_level_bpe(data: _Metadata, notes: list[str]) -> tuple[dict[str, Any], bool]:
    name = data.data.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        close = nearest(str(name), set(PRE_TOKENIZERS))
        hint = f"the nearest is {close!r}; " if close else ""
        raise data.bad(
            f"the pre-tokenizer {name!r} is not known",
            "tokenizer.ggml.pre",
            f"{hint}import the model's HF directory instead",
        )
    if name == "default":
        notes.append("tokenizer.ggml.pre does not name the pre-tokenizer: GPT-2's is assumed")
    pre = PRE_TOKENIZERS[name]
    vocabulary = data.vocabulary()
    merges: list[list[str]] = []
    for index, merge in enumerate(data.list_of("tokenizer.ggml.merges", str)):
        # Byte-level tokens have no raw space, so that the one there is separates.
        left, space, right = merge.partition(" ")
        if not space or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise data.bad(
                f"merge {index} is {merge!r}, which does not join two tokens to one", "tokenizer.ggml.merges"
            )
        merges.append([left, right])
    if not merges:
        raise data.bad("is missing", "tokenizer.ggml.merges")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre.whole_words,
        "vocab": vocabulary,
        "merges": merges,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    parts = {
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.steps,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return parts, pre.adds_bos


def _sentencepiece_bpe(data: _Metadata) -> dict[str, Any]:
    scores = data.list_of("tokenizer.ggml.scores", float)
    if len(scores) != len(data.tokens):
        raise data.bad(f"has {len(scores)} entries for {len(data.tokens)} tokens", "tokenizer.ggml.scores")
    vocabulary = data.vocabulary()
    # Control and byte pieces are never the result of a merge; an unused piece is none at all.
    mergeable = {token for token, kind in zip(data.tokens, data.types, strict=True) if kind in (_NORMAL, _USER_DEFINED)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token in mergeable:
        score = scores[vocabulary[token]]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    ranked.sort()
    space = data.flag("tokenizer.ggml.add_space_prefix", True)
    unknown = data.token("unknown") or next(
        (token for token, kind in zip(data.tokens, data.types, strict=True) if kind == _UNKNOWN), None
    )
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": _BYTE in data.types,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [[left, right] for *_, left, right in ranked],
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [{"type": "Prepend", "prepend": "▁"}] if space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _template(data: _Metadata, adds_bos: bool, adds_eos: bool) -> dict[str, Any] | None:
    """The post-processor that puts BOS before, and perhaps EOS after, each text."""
    special: dict[str, Any] = {}

    def piece(name: str) -> list[dict[str, Any]]:
        token = data.token(name)
        if token is None:
            raise data.bad("is missing, though every text is to have that token", f"tokenizer.ggml.{name}_token_id")
        special[token] = {"id": token, "ids": [data.data[f"tokenizer.ggml.{name}_token_id"]], "tokens": [token]}
        return [{"SpecialToken": {"id": token, "type_id": 0}}]

    if not adds_bos and not adds_eos:
        return None
    before, after = (piece("bos") if adds_bos else []), (piece("eos") if adds_eos else [])
    single = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after]
    second = json.loads(json.dumps(single).replace('"type_id": 0', '"type_id": 1').replace('"id": "A"', '"id": "B"'))
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": special}


def _chat_template(data: _Metadata) -> str | list[dict[str, str]] | None:
    """The default template, or all of them by name where there are more."""
    default = data.data.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in data.data.items() if key.startswith(prefix)}
    if default is not None:
        named = {"default": default, **named}
    for name, template in named.items():
        if not isinstance(template, str):
            raise data.bad(f"the chat template {name!r} is not a string", "tokenizer.chat_template")
    if not named:
        return None
    if list(named) == ["default"]:
        return named["default"]
    return [{"name": name, "template": template} for name, template in named.items()]
