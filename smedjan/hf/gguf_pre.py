"""llama.cpp's byte-level pre-tokenizers, by the name that GGUF files carry: how text is cut before merging.

A name is found for a tokenizer by what its pre-tokenizer does: two that cut alike have one fingerprint, however they
are written. llama.cpp normalizes no text; a name here is one of several that it treats alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def _cased(ending: str, digits: str) -> str:
    """OpenAI's o200k pattern and Mistral's Tekken, which cut where the case changes."""
    first = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{ending}"
    second = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{ending}"
    return rf"{first}|{second}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_SEED_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"type": "Digits", "individual_digits": True}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(regex: str) -> dict[str, Any]:
    return _sequence(
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, _byte_level(False)
    )


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How text is cut before merging. `whole_words`: a word that is a token is that token, whatever the merges."""

    steps: dict[str, Any]
    whole_words: bool = False
    normalizer: dict[str, Any] | None = None
    adds_bos: bool = False


_NFC = {"type": "NFC"}
_GPT2 = PreTokenizer(steps=_byte_level(True))
_SMOLLM = PreTokenizer(steps=_sequence(_DIGITS, _byte_level(True)))
_LLAMA3 = PreTokenizer(steps=_split(_LLAMA3_SPLIT), whole_words=True, adds_bos=True)
_QWEN2 = PreTokenizer(steps=_split(_QWEN2_SPLIT), normalizer=_NFC)
_CL100K = PreTokenizer(steps=_split(_LLAMA3_SPLIT))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "default": _GPT2,
    "olmo": PreTokenizer(steps=_byte_level(True), normalizer=_NFC),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "command-r": PreTokenizer(steps=_SMOLLM.steps, normalizer=_NFC),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "glm4": PreTokenizer(steps=_split(_LLAMA3_SPLIT), whole_words=True),
    "smaug-bpe": _CL100K,
    "dbrx": _CL100K,
    "qwen2": _QWEN2,
    "stablelm2": PreTokenizer(steps=_split(_QWEN2_SPLIT)),
    "deepseek-r1-qwen": PreTokenizer(steps=_split(_QWEN2_SPLIT)),
    "tekken": PreTokenizer(steps=_split(_cased("", r"\p{N}")), whole_words=True, adds_bos=True),
    "gpt-4o": PreTokenizer(steps=_split(_cased(_ENDINGS, r"\p{N}{1,3}"))),
    "seed-coder": PreTokenizer(steps=_split(_SEED_SPLIT)),
}
"""`tokenizer.ggml.pre` -> pre-tokenizer, and how the models of that name normalize text."""


def fingerprint(steps: Any) -> tuple[str, ...] | None:
    """The patterns at which a pre-tokenizer of tokenizer.json cuts, in order, ending in bytes; None where it does
    something else."""
    found = tuple(_patterns(steps))
    return found if found[-1:] == ("bytes",) and "" not in found and found.count("bytes") == 1 else None


def _patterns(step: Any) -> Iterator[str]:
    """One name for each step, "" for one that has none."""
    if not isinstance(step, dict):
        yield ""
        return
    match step.get("type"):
        case "Sequence":
            for inner in step.get("pretokenizers") or ():
                yield from _patterns(inner)
        case "Digits" if step.get("individual_digits"):
            yield r"\p{N}"
        case "Split":
            # Every pattern here covers all text: to isolate matches and to remove what lies between them are one.
            alike = ("Isolated", False), ("Isolated", True), ("Removed", True)
            kind = step.get("behavior"), bool(step.get("invert"))
            pattern = step.get("pattern")
            yield pattern["Regex"] if kind in alike and isinstance(pattern, dict) and "Regex" in pattern else ""
        case "ByteLevel" if not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                yield _GPT2_SPLIT
            yield "bytes"
        case _:
            yield ""


def pre_tokenizer_name(steps: Any, whole_words: bool, normalizer: Any = None) -> str | None:
    """llama.cpp's name for what `steps` do, or None; of several the one whose models normalize text so, too."""
    wanted = fingerprint(steps)
    if wanted is None:
        return None
    found = {
        name: each
        for name, each in PRE_TOKENIZERS.items()
        if each.whole_words == whole_words and fingerprint(each.steps) == wanted
    }
    return next((name for name, each in found.items() if each.normalizer == normalizer), next(iter(found), None))
