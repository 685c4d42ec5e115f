"""A model directory's tokenizer as GGUF metadata: tokens, types, merges or scores, special ids and chat templates.

llama.cpp has two algorithms that `tokenizer.json` files of our families mean. Byte-level BPE (`gpt2`) merges by rank
within words that a pre-tokenizer cuts, which is named (`gguf_pre`). SentencePiece BPE (`llama`) merges any two pieces
whose union is a piece, best score first: merges of HF's form say the same only if they are complete and ranked by their
result, which is checked. What is neither is a TokenizerError, since wrong ids come without one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smedjan.checkpoint.gguf_write import MetadataValue
from smedjan.errors import TokenizerError
from smedjan.hf.gguf_pre import PRE_TOKENIZERS, pre_tokenizer_name
from smedjan.hf.tokenizer import Tokenizer, load_tokenizer
from smedjan.models.config import read_json_object

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""tokenizer.ggml.token_type"""

SPACE = "\u2581"
_APPROXIMATE = ("tekken", "gpt-4o")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_LIKE_IT_IS = "export from the directory that transformers saved, or ask for this tokenizer"
# llama.cpp stops at tokens of these texts, whatever the file says.
_STOPS_BY_TEXT = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
    *("</s>", "<|eom_id|>", "<EOT>", "<|end_of_text|>", "<eos>"),
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """`metadata` are the keys under `tokenizer.`; `stops` the texts of the tokens that end a turn."""

    metadata: dict[str, MetadataValue]
    stops: tuple[str, ...]
    notes: tuple[str, ...]


def vocabulary_of(directory: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a model with `vocab_size` embeddings; what no token has is padded with unused ones."""
    return _Vocabulary(directory, vocab_size).made()


class _Vocabulary:
    def __init__(self, directory: Path, vocab_size: int) -> None:
        self.file = directory / "tokenizer.json"
        self.tokenizer: Tokenizer = load_tokenizer(directory)
        self.data = read_json_object(self.file, TokenizerError)
        self.notes: list[str] = []
        self.model: dict[str, Any] = self.data["model"]
        if self.model.get("type", "BPE") != "BPE":
            raise self.bad(f"is {self.model.get('type')}", "model.type", "llama.cpp's model of our families is BPE")
        self.added: dict[int, dict[str, Any]] = {token["id"]: token for token in self.data.get("added_tokens") or ()}
        self.tokens: dict[int, str] = {index: token for token, index in self.model["vocab"].items()}
        self.tokens.update((index, token["content"]) for index, token in self.added.items())
        if max(self.tokens, default=-1) >= vocab_size:
            raise self.bad(
                f"has token {max(self.tokens)}, the model {vocab_size} embeddings",
                "model.vocab",
                "get the tokenizer that belongs to the model",
            )
        self.vocab_size = vocab_size
        self.byte_level = not self.model.get("byte_fallback")

    def bad(self, message: str, field: str, remedy: str = _LIKE_IT_IS) -> TokenizerError:
        return TokenizerError(message, file=self.file, field=field, remedy=remedy)

    def made(self) -> Vocabulary:
        merges = self._merges()
        texts, types = self._texts(), self._types()
        made: dict[str, MetadataValue] = {
            "tokenizer.ggml.model": "gpt2" if self.byte_level else "llama",
            "tokenizer.ggml.pre": self._pre() if self.byte_level else "default",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.token_type": np.array(types, np.int32),
        }
        if self.byte_level:
            made["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
        else:
            made["tokenizer.ggml.scores"] = self._scores(merges, types)
            made["tokenizer.ggml.add_space_prefix"] = self._space_prefix()
        stops = self._stops()
        made.update(self._special_ids(stops))
        made.update(self._templates())
        self._note_flags()
        return Vocabulary(metadata=made, stops=tuple(self.tokens[stop] for stop in stops), notes=tuple(self.notes))

    def _merges(self) -> list[tuple[str, str]]:
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in self.model["merges"]]
        for index, pair in enumerate(pairs):
            if len(pair) != 2 or " " in "".join(pair):
                raise self.bad(f"merge {index} is {pair!r}, which llama.cpp's form cannot hold", "model.merges")
        return [(pair[0], pair[1]) for pair in pairs]

    def _texts(self) -> list[str]:
        texts = [self.tokens.get(index) or f"[PAD{index}]" for index in range(self.vocab_size)]
        if not self.byte_level:
            # llama.cpp looks for added tokens before it escapes spaces.
            for index, token in self.added.items():
                if not token.get("special"):
                    texts[index] = texts[index].replace(SPACE, " ")
        if len(set(texts)) != len(texts):
            twice = next(text for at, text in enumerate(texts) if text in texts[:at])
            raise self.bad(f"has the token {twice!r} twice", "model.vocab", "llama.cpp tells tokens by their text")
        return texts

    def _types(self) -> list[int]:
        types = [NORMAL if index in self.tokens else UNUSED for index in range(self.vocab_size)]
        for index, token in self.added.items():
            types[index] = CONTROL if token.get("special") else USER_DEFINED
        if not self.byte_level:
            for index, text in self.tokens.items():
                if _BYTE_PIECE.fullmatch(text):
                    types[index] = BYTE
            unknown = self.model["vocab"].get(self.model.get("unk_token"))
            if unknown is not None:
                types[unknown] = UNKNOWN
        return types

    def _pre(self) -> str:
        steps, normalizer = self.data.get("pre_tokenizer"), self.data.get("normalizer")
        name = pre_tokenizer_name(steps, bool(self.model.get("ignore_merges")), normalizer)
        if name is None:
            raise self.bad(
                "cuts text as none of llama.cpp's that are known here",
                "pre_tokenizer",
                f"known: {', '.join(PRE_TOKENIZERS)}",
            )
        if name in _APPROXIMATE:
            self.notes.append("llama.cpp cuts some words of mixed case that are not ASCII in other places")
        if normalizer is not None:
            kinds = [step.get("type") for step in normalizer.get("normalizers", [normalizer])]
            if kinds != ["NFC"]:
                raise self.bad(f"is {', '.join(map(str, kinds))}", "normalizer", "llama.cpp normalizes no text")
            self.notes.append("the tokenizer normalizes text to NFC, llama.cpp does not: give it NFC")
        return name

    def _space_prefix(self) -> bool:
        """Whether a space goes before each text; what else the normalizer does must be to escape spaces."""
        normalizer, pre = self.data.get("normalizer"), self.data.get("pre_tokenizer")
        steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
        prepend = steps[:1] == [{"type": "Prepend", "prepend": SPACE}]
        rest = steps[1:] if prepend else steps
        escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        gemma = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        if rest == [escape] and pre in (None, gemma):
            return prepend
        if not steps and isinstance(pre, dict) and pre.get("type") == "Metaspace" and not pre.get("split", True):
            scheme = pre.get("prepend_scheme", "always")
            if pre.get("replacement") == SPACE and scheme in ("first", "always", "never"):
                if scheme != "never":
                    where = "a text that begins with one" + (" and behind each special token" * (scheme == "first"))
                    self.notes.append(f"llama.cpp puts a space before {where}, the tokenizer does not")
                return scheme != "never"
        raise self.bad("prepares text in a way that llama.cpp's SentencePiece does not", "normalizer")

    def _scores(self, merges: list[tuple[str, str]], types: list[int]) -> np.ndarray:
        """Minus the rank of each piece among results of merges, float32 [V]; equal where their merges are mixed."""
        vocabulary: dict[str, int] = self.model["vocab"]
        spans: dict[str, tuple[int, int]] = {}
        for rank, (left, right) in enumerate(merges):
            first, _ = spans.get(left + right, (rank, rank))
            spans[left + right] = (first, rank)
        plain = {text for text, index in vocabulary.items() if types[index] == NORMAL}
        known = set(merges)
        for text in plain:
            for cut in range(1, len(text)):
                pair = (text[:cut], text[cut:])
                if pair[0] in plain and pair[1] in plain and pair not in known:
                    raise self.bad(
                        f"joins no {pair[0]!r} and {pair[1]!r}, though {text!r} is a token",
                        "model.merges",
                        "llama.cpp would: only merges that come from SentencePiece are exported",
                    )
        scores = np.full(self.vocab_size, -float(len(merges) + 1), np.float32)
        end, score = -1, 0.0
        for text, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
            if first > end:
                score = -float(first)
            end = max(end, last)
            scores[vocabulary[text]] = score
        return scores

    def _stops(self) -> list[int]:
        """The ids that end a turn, the tokenizer's own first."""
        stops = [stop for stop in self.tokenizer.eos_token_ids if stop in self.tokens]
        spare = [stop for stop in stops[3:] if self.tokens[stop] not in _STOPS_BY_TEXT]
        if spare:
            named = ", ".join(self.tokens[stop] for stop in spare)
            self.notes.append(f"a GGUF file has room for three stop tokens: llama.cpp does not stop at {named}")
        return stops

    def _special_ids(self, stops: list[int]) -> Iterator[tuple[str, MetadataValue]]:
        ids = {
            "bos": self.tokenizer.bos_token_id,
            "unknown": self.tokenizer.unk_token_id,
            "padding": self.tokenizer.pad_token_id,
            **dict(zip(("eos", "eot", "eom"), stops, strict=False)),
        }
        for name, index in ids.items():
            if index is not None:
                yield f"tokenizer.ggml.{name}_token_id", index
        with_specials, bare = self.tokenizer.encode("a"), self.tokenizer.encode("a", add_special_tokens=False)
        before, after = _around(with_specials, bare)
        for name, found, one in (("bos", before, self.tokenizer.bos_token_id), ("eos", after, stops[0:1])):
            expected = one if isinstance(one, list) else [one]
            if found and found != expected:
                texts = " ".join(self.tokens[index] for index in found)
                self.notes.append(f"the tokenizer puts {texts} around each text, llama.cpp does not")
            yield f"tokenizer.ggml.add_{name}_token", found == expected

    def _templates(self) -> Iterator[tuple[str, MetadataValue]]:
        named = dict(self.tokenizer.chat_templates)
        if (default := named.pop("default", None)) is not None:
            yield "tokenizer.chat_template", default
        if named:
            yield "tokenizer.chat_templates", list(named)
        for name, template in named.items():
            yield f"tokenizer.chat_template.{name}", template

    def _note_flags(self) -> None:
        flags = ("lstrip", "rstrip", "single_word")
        odd = [token["content"] for token in self.added.values() if any(token.get(flag) for flag in flags)]
        if odd:
            shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
            self.notes.append(f"{shown} take spaces around them into themselves; llama.cpp leaves those")


def _around(ids: list[int], bare: Iterable[int]) -> tuple[list[int], list[int]]:
    """What stands before and behind `bare` in `ids`."""
    inner = list(bare)
    for start in range(len(ids) - len(inner) + 1):
        if ids[start : start + len(inner)] == inner:
            return ids[:start], ids[start + len(inner) :]
    return [], []
