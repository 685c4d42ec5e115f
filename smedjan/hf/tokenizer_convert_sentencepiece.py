"""A SentencePiece `tokenizer.model`, read without protobuf, as the parts of a `tokenizer.json`.

The file is one protobuf message, `ModelProto` of sentencepiece_model.proto:

    ModelProto      1 pieces (repeated)   2 trainer_spec   3 normalizer_spec   5 denormalizer_spec
    SentencePiece   1 piece   2 score (float)   3 type
    TrainerSpec     3 model_type   24 treat_whitespace_as_suffix   35 byte_fallback   40-43 unk, bos, eos, pad id
    NormalizerSpec  2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces   5 escape_whitespaces

Unknown fields are passed over, as protobuf does; what cannot be a field, ends early or has another type is an error.
"""

from __future__ import annotations

import re
import struct
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from smedjan.errors import TokenizerError

# SentencePiece.Type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# TrainerSpec.ModelType
_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {3: "word", 4: "character"}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE_NAMES = {_VARINT: "a varint", _FIXED64: "64 bits", _BYTES: "bytes", _FIXED32: "32 bits"}
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
_AGAIN = "download the file again"
_WITH_TRANSFORMERS = (
    "write tokenizer.json with transformers: AutoTokenizer.from_pretrained(SOURCE).save_pretrained(DIR)"
)

SPACE = "\u2581"
"""What stands for a space in pieces."""


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """The parts of a model that ids depend on. `pieces`: (text, score, type), by id."""

    file: Path
    pieces: tuple[tuple[str, float, int], ...]
    unigram: bool
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    def piece(self, index: int) -> str | None:
        return self.pieces[index][0] if 0 <= index < len(self.pieces) else None

    def specials(self) -> dict[str, str]:
        """`bos_token` and its kin, as trained."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        found = {name: self.piece(index) for name, index in ids.items()}
        return {name: piece for name, piece in found.items() if piece is not None}

    def vocabulary(self) -> dict[str, int]:
        return {text: index for index, (text, _, _) in enumerate(self.pieces)}

    def added_tokens(self) -> list[tuple[str, bool]]:
        """(text, special): control pieces and user-defined ones are cut out of the text before anything else."""
        return [(text, kind == _CONTROL) for text, _, kind in self.pieces if kind in (_CONTROL, _USER_DEFINED)]


class _Message:
    """The fields of one protobuf message, checked for type as they are asked for. Of several values the last counts."""

    def __init__(self, data: memoryview, name: str, file: Path) -> None:
        self.name, self.file = name, file
        self.fields: dict[int, list[tuple[int, Any]]] = {}
        for number, wire, value in self._walk(data):
            self.fields.setdefault(number, []).append((wire, value))

    def bad(self, message: str, remedy: str = _AGAIN) -> TokenizerError:
        return TokenizerError(message, file=self.file, field=self.name, remedy=remedy)

    def _walk(self, data: memoryview) -> Iterator[tuple[int, int, Any]]:
        at = 0

        def varint() -> int:
            nonlocal at
            value = shift = 0
            while True:
                if at >= len(data):
                    raise self.bad(f"ends inside a number at byte {at}: the file is truncated or damaged")
                byte = data[at]
                at += 1
                value |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    return value
                if shift >= 70:
                    raise self.bad(f"has a number of more than 64 bits at byte {at}: the file is damaged")

        while at < len(data):
            key = varint()
            number, wire = key >> 3, key & 7
            if number == 0 or wire not in _WIRE_NAMES:
                raise self.bad(f"has no field at byte {at - 1}: it is no SentencePiece model, or damaged")
            if wire == _VARINT:
                yield number, wire, varint()
                continue
            size = {_FIXED64: 8, _FIXED32: 4}.get(wire) or (varint() if wire == _BYTES else 0)
            if size > len(data) - at:
                raise self.bad(f"claims {size} bytes where {len(data) - at} are left: the file is truncated or damaged")
            yield number, wire, data[at : at + size]
            at += size

    def all(self, number: int, wire: int, name: str) -> list[Any]:
        values = self.fields.get(number, [])
        for found, _ in values:
            if found != wire:
                raise self.bad(f"{name} is {_WIRE_NAMES[found]} instead of {_WIRE_NAMES[wire]}: the file is damaged")
        return [value for _, value in values]

    def integer(self, number: int, name: str, default: int) -> int:
        value: int = (self.all(number, _VARINT, name) or [default])[-1]
        # int32 is written as its 64-bit two's complement.
        return value - (1 << 64) if value >= 1 << 63 else value

    def flag(self, number: int, name: str, default: bool) -> bool:
        return self.integer(number, name, int(default)) != 0

    def data(self, number: int, name: str) -> bytes:
        return bytes((self.all(number, _BYTES, name) or [b""])[-1])

    def message(self, number: int, name: str) -> _Message:
        """The one sub-message of that number; a file that was cut off between two fields lacks it."""
        values = self.all(number, _BYTES, name)
        if not values:
            raise self.bad(f"has no {name}: it is no SentencePiece model, or truncated")
        return _Message(values[-1], name, self.file)


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """The model in `file`; whatever is damaged, or cannot be had exactly in a tokenizer.json, is a TokenizerError."""
    try:
        raw = file.read_bytes()
    except OSError as cause:
        raise TokenizerError(f"cannot be read: {cause}", file=file, remedy=_AGAIN) from cause
    if _TIKTOKEN.match(raw):
        raise TokenizerError(
            "is a tiktoken vocabulary, which does not say how text is cut", file=file, remedy=_WITH_TRANSFORMERS
        )
    model = _Message(memoryview(raw), "ModelProto", file)
    trainer, normalizer = model.message(2, "trainer_spec"), model.message(3, "normalizer_spec")
    kind = trainer.integer(3, "model_type", _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise trainer.bad(f"model_type is {_MODEL_TYPES.get(kind, kind)}, not bpe or unigram", _WITH_TRANSFORMERS)
    if trainer.flag(24, "treat_whitespace_as_suffix", False):
        raise trainer.bad("treat_whitespace_as_suffix is set, which tokenizer.json cannot say", _WITH_TRANSFORMERS)
    if not normalizer.flag(5, "escape_whitespaces", True):
        raise normalizer.bad("escape_whitespaces is off, which tokenizer.json cannot say", _WITH_TRANSFORMERS)
    if 5 in model.fields and model.message(5, "denormalizer_spec").data(2, "precompiled_charsmap"):
        raise model.bad("denormalizer_spec rewrites decoded text, which tokenizer.json cannot say", _WITH_TRANSFORMERS)
    return SentencePieceModel(
        file=file,
        pieces=_pieces(model, trainer.flag(35, "byte_fallback", False)),
        unigram=kind == _UNIGRAM,
        byte_fallback=trainer.flag(35, "byte_fallback", False),
        unk_id=trainer.integer(40, "unk_id", 0),
        bos_id=trainer.integer(41, "bos_id", 1),
        eos_id=trainer.integer(42, "eos_id", 2),
        pad_id=trainer.integer(43, "pad_id", -1),
        charsmap=normalizer.data(2, "precompiled_charsmap"),
        add_dummy_prefix=normalizer.flag(3, "add_dummy_prefix", True),
        remove_extra_whitespaces=normalizer.flag(4, "remove_extra_whitespaces", True),
    )


def _pieces(model: _Message, byte_fallback: bool) -> tuple[tuple[str, float, int], ...]:
    pieces: list[tuple[str, float, int]] = []
    seen: set[str] = set()
    for index, raw in enumerate(model.all(1, _BYTES, "pieces")):
        entry = _Message(raw, f"pieces[{index}]", model.file)
        try:
            text = entry.data(1, "piece").decode()
        except UnicodeDecodeError as cause:
            raise entry.bad(f"is no UTF-8 ({cause.reason})") from cause
        (score,) = struct.unpack("<f", (entry.all(2, _FIXED32, "score") or [b"\0\0\0\0"])[-1])
        kind = entry.integer(3, "type", _NORMAL)
        if not text or text in seen:
            raise entry.bad(f"is {text!r}, which " + ("stands there twice" if text else "is empty"))
        if not isfinite(score):
            raise entry.bad(f"has the score {score}")
        if not _NORMAL <= kind <= _BYTE:
            raise entry.bad(f"has the unknown type {kind}")
        seen.add(text)
        pieces.append((text, score, kind))
    kinds = [kind for _, _, kind in pieces]
    if kinds.count(_UNKNOWN) != 1:
        raise model.bad(f"has {kinds.count(_UNKNOWN)} unknown pieces instead of one: it is truncated or damaged")
    bytes_there = {text for text, _, kind in pieces if kind == _BYTE}
    if byte_fallback and bytes_there != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise model.bad(f"has {len(bytes_there)} byte pieces for byte_fallback, not <0x00> to <0xFF>")
    return tuple(pieces)


def merges(model: SentencePieceModel) -> list[list[str]]:
    """Every pair of pieces whose union is a piece, best score first, then in transformers' order.

    SentencePiece stores no merges: it joins the two neighbours whose union scores best. Pieces that stand for
    something else than their text are never joined or made.
    """
    vocabulary = model.vocabulary()
    mergeable = {text for text, _, kind in model.pieces if kind in (_NORMAL, _USER_DEFINED)}
    ranked: list[tuple[float, int, int, int, int, int]] = []
    for index, (text, score, kind) in enumerate(model.pieces):
        if kind not in (_NORMAL, _USER_DEFINED, _UNUSED):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left not in mergeable or right not in mergeable:
                continue
            if kind == _UNUSED:
                raise TokenizerError(
                    f"the unused piece {text!r} can arise from others, which tokenizer.json cannot forbid",
                    file=model.file,
                    field=f"pieces[{index}]",
                    remedy=_WITH_TRANSFORMERS,
                )
            ranked.append((-score, index, cut, len(right), vocabulary[left], vocabulary[right]))
    ranked.sort()
    return [[model.pieces[left][0], model.pieces[right][0]] for *_, left, right in ranked]


def _model(model: SentencePieceModel) -> dict[str, Any]:
    (unknown,) = (index for index, (_, _, kind) in enumerate(model.pieces) if kind == _UNKNOWN)
    if model.unigram:
        unused = next((index for index, (_, _, kind) in enumerate(model.pieces) if kind == _UNUSED), None)
        if unused is not None:
            raise TokenizerError(
                f"the piece {model.pieces[unused][0]!r} is unused, which tokenizer.json cannot say of a unigram piece",
                file=model.file,
                field=f"pieces[{unused}]",
                remedy=_WITH_TRANSFORMERS,
            )
        scored = [[text, score] for text, score, _ in model.pieces]
        return {"type": "Unigram", "unk_id": unknown, "vocab": scored, "byte_fallback": model.byte_fallback}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[unknown][0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": model.vocabulary(),
        "merges": merges(model),
    }


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sentencepiece_parts(model: SentencePieceModel, prefix: bool, legacy: bool) -> dict[str, Any]:
    """`normalizer`, `pre_tokenizer`, `decoder` and `model` of a tokenizer.json.

    `prefix`: a space is put before the text. `legacy`: before each stretch of text between special tokens, and also
    where it begins with a space, which is what SentencePiece itself does with the whole text; otherwise before the
    first stretch alone, and only where there is no space.
    """
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": b64encode(model.charsmap).decode()})
    if model.remove_extra_whitespaces:
        steps.append(_replace({"Regex": r"\A +|[ \x{2581}]+\z"}, ""))
        steps.append(_replace({"Regex": " {2,}"}, " "))
    pre_tokenizer = None
    if legacy or not prefix:
        steps += [{"type": "Prepend", "prepend": SPACE}] if prefix else []
        steps.append(_replace({"String": " "}, SPACE))
    else:
        pre_tokenizer = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    decoders: list[dict[str, Any]] = [_replace({"String": SPACE}, " ")]
    decoders += [{"type": "ByteFallback"}] if model.byte_fallback else []
    decoders.append({"type": "Fuse"})
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(model),
    }
