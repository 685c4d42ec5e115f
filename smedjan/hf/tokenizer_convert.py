"""`tokenizer.json` for a directory that has only older files: SentencePiece's, or `vocab.json` with `merges.txt`.

Ids are those of transformers, but where it parts from the SentencePiece model itself: transformers 5 takes away the
space with which a text begins and (without `legacy: true`) the one after a special token, and for some model types the
dummy prefix altogether. Here a Llama gives SentencePiece's ids, as it does in llama.cpp and in its own tokenizer.json,
and transformers 5's only where its config says `legacy: false`. That all agree about the converted directory, it names
the class `PreTrainedTokenizerFast`, which takes tokenizer.json as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smedjan.errors import TokenizerError
from smedjan.hf.tokenizer_classes import (
    TokenizerClass,
    named_tokens,
    optional_json,
    token_content,
    tokenizer_class,
)
from smedjan.hf.tokenizer_convert_sentencepiece import read_sentencepiece, sentencepiece_parts
from smedjan.models.config import read_json_object

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Sorts after every declared id.
_LAST = 1 << 62
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_AGAIN = "download the tokenizer's files again"


def convert_tokenizer(directory: Path | str) -> dict[str, bytes]:
    """File name -> content to add to the imported directory: `tokenizer.json`, and `tokenizer_config.json` completed.

    {} where `directory` has a tokenizer.json, or nothing to make one from. Damaged or contradictory files, and a class
    whose way of cutting text is not known, are TokenizerErrors.
    """
    directory = Path(directory)
    sentencepiece, byte_level = directory / "tokenizer.model", directory / "vocab.json"
    if (directory / "tokenizer.json").is_file() or not (sentencepiece.is_file() or byte_level.is_file()):
        return {}
    config = optional_json(directory / "tokenizer_config.json")
    name, kind = tokenizer_class(directory, config)
    source = _Source(directory=directory, config=config, kind=kind)
    needed = sentencepiece if kind.sentencepiece else byte_level
    if not needed.is_file():
        raise TokenizerError(
            f"{name} reads {needed.name}, which is missing",
            file=directory / "tokenizer_config.json",
            field="tokenizer_class",
            remedy="correct the class, or download the file too",
        )
    if kind.sentencepiece:
        return _files(source, _from_sentencepiece(source, sentencepiece))
    return _files(source, _from_vocabulary(source, byte_level))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A directory to convert, and what its class says of it."""

    directory: Path
    config: dict[str, Any]
    kind: TokenizerClass

    @property
    def file(self) -> Path:
        return self.directory / "tokenizer_config.json"

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise TokenizerError(f"is {value!r}", file=self.file, field=name, remedy="give true or false")
        return value


@dataclass(frozen=True, kw_only=True)
class _Converted:
    """`parts` of a tokenizer.json, the ids of its model, the model's own added tokens (text, special), and its special
    tokens where the directory names none."""

    parts: dict[str, Any]
    vocabulary: dict[str, int]
    added: list[tuple[str, bool]]
    specials: dict[str, str]


def _from_sentencepiece(source: _Source, file: Path) -> _Converted:
    model = read_sentencepiece(file)
    prefix = source.flag("add_prefix_space", model.add_dummy_prefix)
    if not source.kind.sets_prefix:
        prefix = model.add_dummy_prefix
    return _Converted(
        parts=sentencepiece_parts(model, prefix, legacy=source.flag("legacy", True)),
        vocabulary=model.vocabulary(),
        added=model.added_tokens(),
        specials={**source.kind.specials, **model.specials()},
    )


def _from_vocabulary(source: _Source, file: Path) -> _Converted:
    """A byte-level BPE: `vocab.json` {token: id}, `merges.txt` a pair a line, best first, as GPT-2 wrote them."""
    vocabulary = read_json_object(file, TokenizerError)
    if not all(type(index) is int for index in vocabulary.values()) or sorted(vocabulary.values()) != list(
        range(len(vocabulary))
    ):
        raise TokenizerError(
            f"does not number its {len(vocabulary)} tokens from 0 without a gap", file=file, remedy=_AGAIN
        )
    pre_tokenizer = source.kind.pre_tokenizer
    assert pre_tokenizer is not None, "a byte-level class has a pre-tokenizer"
    if source.kind.sets_prefix and source.flag("add_prefix_space", False):
        pre_tokenizer = json.loads(
            json.dumps(pre_tokenizer).replace('"add_prefix_space": false', '"add_prefix_space": true')
        )
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": _merges(file.with_name("merges.txt"), vocabulary),
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    parts = {
        "normalizer": source.kind.normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "model": model,
    }
    return _Converted(parts=parts, vocabulary=vocabulary, added=[], specials=source.kind.specials)


def _merges(file: Path, vocabulary: dict[str, int]) -> list[list[str]]:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise TokenizerError(f"cannot be read: {cause}", file=file, remedy=_AGAIN) from cause
    merges: list[list[str]] = []
    # Not splitlines: a token may hold what Unicode calls a line break.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(token in vocabulary for token in (*pair, "".join(pair))):
            raise TokenizerError(
                f"{line!r} does not join two tokens of vocab.json to a third",
                file=file,
                field=f"line {number}",
                remedy=_AGAIN,
            )
        merges.append(pair)
    if not merges:
        raise TokenizerError("holds no merges", file=file, remedy=_AGAIN)
    return merges


def _files(source: _Source, converted: _Converted) -> dict[str, bytes]:
    named = _names(source, converted)
    extra = _extra_specials(source)
    added = _added_tokens(source, converted, named, extra)
    ids = {token["content"]: token["id"] for token in added}
    adds = {
        key: source.flag(f"add_{key}_token", default) and named.get(f"{key}_token") is not None
        for key, default in (("bos", source.kind.adds_bos), ("eos", False))
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": converted.parts["normalizer"],
        "pre_tokenizer": converted.parts["pre_tokenizer"],
        "post_processor": _post_processor(named, ids, adds),
        "decoder": converted.parts["decoder"],
        "model": converted.parts["model"],
    }
    complete = {key: value for key, value in source.config.items() if key not in ("auto_map", *_EXTRA)}
    complete |= {
        # Every other class rebuilds its own steps in transformers 5 and drops those of tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": source.flag("clean_up_tokenization_spaces", False),
        "add_bos_token": adds["bos"],
        "add_eos_token": adds["eos"],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        **{key: token for key, token in named.items() if key in source.config or token is not None},
    }
    if extra:
        complete["extra_special_tokens"] = list(extra.values())
    return {
        "tokenizer.json": (json.dumps(tokenizer, ensure_ascii=False) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(complete, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _names(source: _Source, converted: _Converted) -> dict[str, str | None]:
    """`bos_token` and its kin. The first conversions of Llama name them "", which is no token."""
    given = {
        name: token_content(token, source.file, name)
        for name, token in named_tokens(source.directory, source.config).items()
    }
    silent = {name for name in converted.specials if given.get(name, "") == ""}
    known = {*converted.vocabulary, *(_contents(source))}
    return {name: token for name, token in given.items() if token != ""} | {
        name: converted.specials[name] for name in silent if converted.specials[name] in known
    }


def _contents(source: _Source) -> Iterable[str]:
    """The texts of the tokens that the directory adds."""
    decoder = source.config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return [token["content"] for token in decoder.values() if isinstance(token, dict) and "content" in token]
    return optional_json(source.directory / "added_tokens.json")


def _extra_specials(source: _Source) -> dict[str, Any]:
    """Special tokens without a name of their own: text -> the token as given, a string or an AddedToken object."""
    found: dict[str, Any] = {}
    for file in (source.file, source.directory / "special_tokens_map.json"):
        data = optional_json(file)
        for key in _EXTRA:
            value = data.get(key) or []
            if not isinstance(value, list | dict):
                raise TokenizerError(f"is {value!r}, not a list", file=file, field=key, remedy="give a list of tokens")
            for token in value.values() if isinstance(value, dict) else value:
                if content := token_content(token, file, key):
                    found.setdefault(content, token)
    return found


def _added_token(content: str, special: bool, given: Any = None) -> dict[str, Any]:
    """A token as tokenizer.json writes it, with the flags of an AddedToken object where one was given."""
    token = dict.fromkeys(_FLAGS, False) | {"special": special, "normalized": not special}
    if isinstance(given, dict):
        token |= {name: given[name] for name in _FLAGS if isinstance(given.get(name), bool)}
    return {"content": content, **token}


def _declared(source: _Source, special: set[str]) -> tuple[Path, list[tuple[int, dict[str, Any]]]]:
    """The tokens that the directory adds, with their ids, and the file that says so."""
    if "added_tokens_decoder" in source.config:
        file, field = source.file, "added_tokens_decoder"
        entries = source.config[field]
        if not isinstance(entries, dict):
            raise TokenizerError(f"is {entries!r}", file=file, field=field, remedy="give an object {id: token}")
        found = [(index, token_content(token, file, f"{field}.{index}"), token) for index, token in entries.items()]
    else:
        file, field = source.directory / "added_tokens.json", None
        found = [(index, text, None) for text, index in optional_json(file).items()]
    tokens: list[tuple[int, dict[str, Any]]] = []
    for index, text, given in found:
        if not str(index).isdecimal() or isinstance(index, bool) or not text:
            raise TokenizerError(f"{index!r}: {text!r} is not an id and a token", file=file, field=field, remedy=_AGAIN)
        tokens.append((int(index), _added_token(text, text in special and given is None, given)))
    return file, tokens


def _added_tokens(
    source: _Source, converted: _Converted, named: dict[str, str | None], extra: dict[str, Any]
) -> list[dict[str, Any]]:
    """tokenizer.json's `added_tokens`, by id: the model's own, those that the directory adds, and every special one.

    A token that the model's vocabulary lacks is new: its id is the one declared, or the next, without a gap.
    """
    given = named_tokens(source.directory, source.config)
    specials = {token: given.get(name) for name, token in named.items() if token is not None}
    specials = extra | specials
    tokens = {text: _added_token(text, special, {"normalized": False}) for text, special in converted.added}
    file, declared = _declared(source, set(specials))
    tokens |= {token["content"]: token for _, token in declared}
    for text, flags in specials.items():
        tokens[text] = {**tokens.get(text, _added_token(text, True, flags)), "special": True}
    # What stands in the list replaces the flags of added_tokens_decoder, as in transformers 5.
    tokens |= {text: {**_added_token(text, True, token), "special": True} for text, token in extra.items()}
    ids, wanted = dict(converted.vocabulary), {token["content"]: index for index, token in declared}
    for text in sorted(tokens, key=lambda text: wanted.get(text, _LAST)):
        ids.setdefault(text, len(ids))
    for text, index in wanted.items():
        if ids[text] != index:
            raise TokenizerError(
                f"gives {text!r} the id {index}, where the vocabulary has or leaves it {ids[text]}",
                file=file,
                field=str(index),
                remedy=_AGAIN,
            )
    return sorted(({"id": ids[text], **token} for text, token in tokens.items()), key=lambda token: token["id"])


def _post_processor(named: dict[str, str | None], ids: dict[str, int], adds: dict[str, bool]) -> dict[str, Any] | None:
    """What puts BOS before, and perhaps EOS after, each text."""
    special: dict[str, Any] = {}

    def piece(key: str, type_id: int) -> list[dict[str, Any]]:
        token = named.get(f"{key}_token")
        if not adds[key] or token is None:
            return []
        special[token] = {"id": token, "ids": [ids[token]], "tokens": [token]}
        return [{"SpecialToken": {"id": token, "type_id": type_id}}]

    if not any(adds.values()):
        return None
    single, second = (
        [*piece("bos", number), {"Sequence": {"id": letter, "type_id": number}}, *piece("eos", number)]
        for number, letter in enumerate("AB")
    )
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": special}
