"""What cannot be converted exactly is an error that names file, field and remedy; damage is never passed over."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2

from smedjan.errors import TokenizerError
from smedjan.hf.tokenizer_convert import convert_tokenizer
from smedjan.hf.tokenizer_convert_sentencepiece import SentencePieceModel, read_sentencepiece
from tests.hf.test_tokenizer_convert import train, train_byte_level


def refused(call: Any, *args: Any) -> TokenizerError:
    with pytest.raises(TokenizerError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.remedy
    return caught.value


def read(file: Path, raw: bytes) -> SentencePieceModel | None:
    """The model in `raw`, or None where that is refused as it should be."""
    file.write_bytes(raw)
    try:
        return read_sentencepiece(file)
    except TokenizerError:
        assert refused(read_sentencepiece, file).file == str(file)
        return None


def test_a_cut_file_is_refused_or_nothing_is_missing(tmp_path: Path) -> None:
    raw, file, draw = train(), tmp_path / "tokenizer.model", random.Random(0)
    whole = read(file, raw)
    sizes = sorted({*range(300), *draw.sample(range(len(raw)), 150), *range(len(raw) - 150, len(raw))})
    models = [read(file, raw[:size]) for size in sizes]
    assert all(model in (None, whole) for model in models)
    assert models.count(None) > 550


def test_a_flipped_bit_is_refused_or_a_model(tmp_path: Path) -> None:
    """Not every damage can be seen (a letter of a piece); none gets past as another error."""
    raw, file, draw = train(), tmp_path / "tokenizer.model", random.Random(1)
    models = []
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        models.append(read(file, bytes(damaged)))
    assert models.count(None) > 50


def edited(field: str, value: Any, piece: int | None = None) -> bytes:
    """The model of `train` with one field changed through Google's own protobuf."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(train())
    *path, name = field.split(".")
    holder = model if piece is None else model.pieces[piece]
    for part in path:
        holder = getattr(holder, part)
    setattr(holder, name, value)
    return model.SerializeToString()


MODELS: dict[str, tuple[bytes, str | None, str]] = {
    "empty": (b"", "ModelProto", "has no trainer_spec"),
    "text": (b"this is no protobuf at all", "ModelProto", "it is no SentencePiece model"),
    "tiktoken": (b"IQ== 0\nIg== 1\n", None, "is a tiktoken vocabulary"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "ModelProto", "it is no SentencePiece model"),
    "word": (edited("trainer_spec.model_type", 3), "trainer_spec", "model_type is word"),
    "suffix": (edited("trainer_spec.treat_whitespace_as_suffix", True), "trainer_spec", "treat_whitespace_as_suffix"),
    "unescaped": (edited("normalizer_spec.escape_whitespaces", False), "normalizer_spec", "escape_whitespaces"),
    "denormalizer": (edited("denormalizer_spec.precompiled_charsmap", b"x"), "ModelProto", "rewrites decoded text"),
    "twice": (edited("piece", "<s>", 300), "pieces[300]", "stands there twice"),
    "no text": (edited("piece", "", 300), "pieces[300]", "is empty"),
    "score": (edited("score", float("nan"), 300), "pieces[300]", "has the score nan"),
    "two unknown": (edited("type", 2, 300), "ModelProto", "2 unknown pieces"),
    "no unknown": (edited("type", 3, 0), "ModelProto", "0 unknown pieces"),
    "bytes": (edited("type", 1, 10), "ModelProto", "255 byte pieces"),
    "unused": (edited("type", 5, 300), "pieces[300]", "can arise from others"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_no_tokenizer(name: str, tmp_path: Path) -> None:
    raw, field, message = MODELS[name]
    (tmp_path / "tokenizer.model").write_bytes(raw)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    error = refused(convert_tokenizer, tmp_path)
    assert (error.file, error.field) == (str(tmp_path / "tokenizer.model"), field)
    assert message in error.message


def test_an_unused_piece_that_cannot_arise_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(edited("type", 5, 699))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    assert set(convert_tokenizer(tmp_path)) == {"tokenizer.json", "tokenizer_config.json"}


CONFIG = "tokenizer_config.json"
GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
BAD_DECODER = {"x": {"content": "<x>"}}
DIRECTORIES: dict[str, tuple[dict[str, Any], str, str | None, str]] = {
    "no class": ({CONFIG: {}}, CONFIG, "tokenizer_class", "is missing"),
    "unknown": ({CONFIG: {"tokenizer_class": "GPT3Tokenizer"}}, CONFIG, "tokenizer_class", "'GPT3Tokenizer' is not a"),
    "no name": ({CONFIG: {"tokenizer_class": 3}}, CONFIG, "tokenizer_class", "is 3"),
    "generic": ({CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}}, CONFIG, "tokenizer_class", "is not a class"),
    "other files": ({CONFIG: {"tokenizer_class": "LlamaTokenizer"}}, CONFIG, "tokenizer_class", "is missing"),
    "config": ({CONFIG: []}, CONFIG, None, "not an object"),
    "flag": ({CONFIG: {**GPT2, "add_bos_token": "yes"}}, CONFIG, "add_bos_token", "'yes'"),
    "token": ({CONFIG: {**GPT2, "eos_token": 3}}, CONFIG, "eos_token", "not a token"),
    "list": ({CONFIG: {**GPT2, "extra_special_tokens": "<x>"}}, CONFIG, "extra_special_tokens", "not a list"),
    "decoder": ({CONFIG: {**GPT2, "added_tokens_decoder": BAD_DECODER}}, CONFIG, "added_tokens_decoder", "not an id"),
    "no decoder": ({CONFIG: {**GPT2, "added_tokens_decoder": 7}}, CONFIG, "added_tokens_decoder", "is 7"),
    "gap": ({"added_tokens.json": {"<x>": 702}}, "added_tokens.json", "702", "gives '<x>' the id 702"),
    "taken": ({"added_tokens.json": {"<x>": 5}}, "added_tokens.json", "5", "gives '<x>' the id 5"),
    "moved": ({"added_tokens.json": {"<|im_end|>": 700}}, "added_tokens.json", "700", "leaves it 1"),
    "vocabulary": ({"vocab.json": {"a": 0, "b": 2}}, "vocab.json", None, "without a gap"),
    "no ids": ({"vocab.json": {"a": "0"}}, "vocab.json", None, "without a gap"),
    "no merges": ({"merges.txt": b"#version: 0.2\n"}, "merges.txt", None, "holds no merges"),
    "three": ({"merges.txt": b"a b c\n"}, "merges.txt", "line 1", "'a b c' does not join"),
    "unknown pair": ({"merges.txt": b"#version: 0.2\na zzzz\n"}, "merges.txt", "line 2", "does not join"),
    "bytes": ({"merges.txt": b"\xff\xfe"}, "merges.txt", None, "cannot be read"),
    "absent": ({"merges.txt": None}, "merges.txt", None, "cannot be read"),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories_that_contradict_themselves(name: str, tmp_path: Path) -> None:
    changes, file, field, message = DIRECTORIES[name]
    vocabulary, pairs = train_byte_level()
    lines = "".join(f"{left} {right}\n" for left, right in pairs).encode()
    for written, content in {"vocab.json": vocabulary, "merges.txt": lines, CONFIG: GPT2, **changes}.items():
        if content is not None:
            (tmp_path / written).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    error = refused(convert_tokenizer, tmp_path)
    assert (error.file, error.field) == (str(tmp_path / file), field)
    assert message in error.message


def test_there_may_be_nothing_to_convert(tmp_path: Path) -> None:
    assert convert_tokenizer(tmp_path) == {}
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    assert convert_tokenizer(tmp_path) == {}
