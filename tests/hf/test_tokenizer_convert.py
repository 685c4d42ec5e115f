"""Converted tokenizers give the ids of sentencepiece and of transformers on hard text; damaged files are named.

`source` is a directory without tokenizer.json, `out` the same one with what `convert_tokenizer` adds.
"""

from __future__ import annotations

import inspect
import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from json import decoder, encoder
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from smedjan.hf.tokenizer import Tokenizer, load_tokenizer
from smedjan.hf.tokenizer_convert import convert_tokenizer
from smedjan.hf.tokenizer_convert_sentencepiece import merges, read_sentencepiece
from tests import hard_text as hard

CORPUS = [line for module in (decoder, encoder, hard) for line in inspect.getsource(module).splitlines() if line] * 8
CORPUS += [text for text in hard.hard_text(7, 300, controls=False) if text.strip()]
PLAIN = hard.hard_text(1, 1200)
SPECIALS = ("<s>", "</s>", "<unk>", "<tool>", "<pad>", "<x>")
HARD = hard.hard_text(2, 1200, special=SPECIALS)
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}


@cache
def train(**changes: Any) -> bytes:
    """A SentencePiece model as Llama's: BPE with byte fallback, identity normalization, a dummy prefix."""
    settings = {
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "character_coverage": 0.98,
        "user_defined_symbols": "<tool>",
        "minloglevel": 2,
    }
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=buffer, **settings | changes)
    return buffer.getvalue()


@cache
def train_byte_level() -> tuple[dict[str, int], list[list[str]]]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], model["merges"]


class Case:
    """One directory, converted: `ours`, and transformers' view of the directory before (`peer`) and after (`back`)."""

    def __init__(self, folder: Path, files: dict[str, Any]) -> None:
        self.source, self.out = folder / "source", folder / "out"
        self.source.mkdir()
        for name, content in files.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (self.source / name).write_bytes(raw)
        shutil.copytree(self.source, self.out)
        for name, content in convert_tokenizer(self.source).items():
            (self.out / name).write_bytes(content)

    @property
    def ours(self) -> Tokenizer:
        return load_tokenizer(self.out)

    @property
    def peer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.source)

    @property
    def back(self) -> Any:
        return AutoTokenizer.from_pretrained(self.out)


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., Case]:
    return lambda config=None, **files: Case(
        tmp_path,
        ({} if config is None else {"tokenizer_config.json": config})
        | {name.replace("__", "."): content for name, content in files.items()},
    )


@pytest.fixture
def byte_level(case: Callable[..., Case]) -> Callable[..., Case]:
    vocabulary, pairs = train_byte_level()
    lines = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in pairs)
    return lambda config=None, **files: case(config, vocab__json=vocabulary, merges__txt=lines.encode(), **files)


def differing(texts: list[str], left: Callable[[str], list[int]], right: Callable[[str], list[int]]) -> list[str]:
    return [text for text in texts if left(text) != right(text)]


def assert_same_everywhere(ours: Tokenizer, peer: Any, texts: list[str]) -> None:
    """Ids with and without specials, and text from them with and without specials."""
    assert differing(texts, ours.encode, peer.encode) == []
    assert differing(texts, lambda t: ours.encode(t, False), lambda t: peer.encode(t, add_special_tokens=False)) == []
    for text in texts:
        ids = ours.encode(text)
        assert ours.decode(ids, False) == peer.decode(ids)
        assert ours.decode(ids, True) == peer.decode(ids, skip_special_tokens=True)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, LLAMA),
    "legacy": ({}, {**LLAMA, "legacy": True}),
    "mistral": ({}, {**LLAMA, "add_eos_token": True}),
    "no prefix": ({"add_dummy_prefix": False}, LLAMA),
    "white space removed": ({"remove_extra_whitespaces": True}, LLAMA),
    "white space removed, no prefix": ({"remove_extra_whitespaces": True, "add_dummy_prefix": False}, LLAMA),
    "no byte fallback": ({"byte_fallback": False}, LLAMA),
    "gemma": (
        {"add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>"},
        {"tokenizer_class": "GemmaTokenizer"},
    ),
    "split digits": ({"split_digits": True, "allow_whitespace_only_pieces": True}, LLAMA),
}
# Text that transformers takes for special tokens, which sentencepiece never does.
NO_TOKENS = [text for text in PLAIN if not any(token in text for token in SPECIALS)]


@pytest.mark.parametrize("name", VARIANTS)
def test_bpe_gives_the_ids_of_sentencepiece(name: str, case: Callable[..., Case]) -> None:
    changes, config = VARIANTS[name]
    made = case(config, tokenizer__model=train(**changes))
    peer = sentencepiece.SentencePieceProcessor(model_proto=train(**changes))
    ours = made.ours
    assert len(NO_TOKENS) > 1190
    assert differing(NO_TOKENS, lambda text: ours.encode(text, False), peer.encode) == []
    pairs = [(ours.encode(text, False), peer.encode(text)) for text in NO_TOKENS]
    whole = [(left, right) for left, right in pairs if peer.unk_id() not in right]
    assert [left for left, right in whole if ours.decode(left, False) != peer.decode(right)] == []
    assert len(whole) > 50
    assert_same_everywhere(ours, made.back, HARD)
    assert ours.encode("a")[0] == peer.bos_id() == ours.bos_token_id
    assert (ours.eos_token_id, ours.unk_token_id) == (peer.eos_id(), peer.unk_id())
    assert merges(read_sentencepiece(made.source / "tokenizer.model")) == [
        list(pair) for pair in json.loads(made.peer.backend_tokenizer.to_str())["model"]["merges"]
    ]


@pytest.mark.parametrize("config", [{"legacy": False}, {"legacy": False, "add_prefix_space": False}])
def test_a_llama_that_is_not_legacy_is_transformers_to_the_id(config: dict, case: Callable[..., Case]) -> None:
    """Every token of the hard text included; sentencepiece parts from both where a text begins with a space alone."""
    made = case({**LLAMA, **config}, tokenizer__model=train())
    assert_same_everywhere(made.ours, made.peer, HARD)
    assert_same_everywhere(made.ours, made.back, HARD)
    if "add_prefix_space" not in config:
        peer = sentencepiece.SentencePieceProcessor(model_proto=train())
        apart = differing(NO_TOKENS, lambda text: made.ours.encode(text, False), peer.encode)
        assert apart
        assert all(text.startswith((" ", "\u2581")) for text in apart)


def test_gemma_is_transformers_to_the_id(case: Callable[..., Case]) -> None:
    changes, _ = VARIANTS["gemma"]
    model = train(**changes, bos_piece="<bos>", eos_piece="<eos>", user_defined_symbols="<mask>,<tool>,\n\n")
    made = case({"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}, tokenizer__model=model)
    assert_same_everywhere(made.ours, made.peer, HARD)
    assert_same_everywhere(made.ours, made.back, HARD)


def test_where_transformers_5_parts_from_sentencepiece(case: Callable[..., Case]) -> None:
    """A Llama without `legacy`: only text that begins with a space, or follows a special token. Ours is the model's."""
    made = case(LLAMA, tokenizer__model=train())
    apart = differing(HARD, made.ours.encode, made.peer.encode)
    assert apart
    assert all(text.startswith((" ", "\u2581")) or any(token in text for token in SPECIALS) for text in apart)
    assert made.ours.encode("a</s>b", False) == [*made.ours.encode("a", False), 2, *made.ours.encode("b", False)]


@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize("byte_fallback", [False, True])
def test_unigram_gives_the_ids_of_sentencepiece(spaces: bool, byte_fallback: bool, case: Callable[..., Case]) -> None:
    """Or others of exactly the same score: which of several best cuts is found, the two libraries leave open. The
    text of a byte piece (`<0x41>`) is that piece to `tokenizers`, as in transformers."""
    changes = {"model_type": "unigram", "remove_extra_whitespaces": spaces, "byte_fallback": byte_fallback}
    made = case({**LLAMA, "legacy": True}, tokenizer__model=train(**changes))
    peer = sentencepiece.SentencePieceProcessor(model_proto=train(**changes))
    ours = made.ours
    texts = [text for text in NO_TOKENS if "<0x" not in text]
    apart = differing(texts, lambda text: ours.encode(text, False), peer.encode)
    assert len(apart) < 10
    for text in apart:
        left, right = (sum(map(peer.get_score, ids)) for ids in (ours.encode(text, False), peer.encode(text)))
        assert left == pytest.approx(right, rel=1e-6)
    assert_same_everywhere(ours, made.back, HARD)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_normalizing_model_gives_the_ids_of_sentencepiece(kind: str, case: Callable[..., Case]) -> None:
    """NFKC by the model's own table. `tokenizers` looks up whole graphemes of up to 5 bytes, sentencepiece the longest
    prefix: text with longer graphemes, or ones that the table has only a part of, may differ, as it does in
    transformers."""
    changes = {"model_type": kind, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"}
    made = case(LLAMA, tokenizer__model=train(**changes))
    peer = sentencepiece.SentencePieceProcessor(model_proto=train(**changes))
    simple = [text for text in NO_TOKENS if all(len(g) == 1 for g in regex.findall(r"\X", text)) and "<0x" not in text]
    assert len(simple) > 450
    apart = differing(simple, lambda text: made.ours.encode(text, False), peer.encode)
    assert len(apart) <= (0 if kind == "bpe" else 5)
    for text in apart:
        left, right = (sum(map(peer.get_score, ids)) for ids in (made.ours.encode(text, False), peer.encode(text)))
        assert left == pytest.approx(right, rel=1e-6)


TOKEN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
ADDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "added_tokens.json": (
        {"add_eos_token": True, "pad_token": "<pad>"},
        {
            "added_tokens__json": {"<pad>": 700, "<x>": 701},
            "special_tokens_map__json": {"bos_token": {"content": "<s>", **TOKEN}, "unk_token": "<unk>"},
        },
    ),
    "added_tokens_decoder": (
        {
            "pad_token": "<pad>",
            "additional_special_tokens": ["<x>"],
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True, **TOKEN},
                "700": {"content": "<pad>", "special": True, **TOKEN, "lstrip": True, "rstrip": True},
                "701": {"content": "<x>", "special": True, **TOKEN},
                "702": {"content": "word", "special": False, **TOKEN, "single_word": True, "normalized": True},
            },
        },
        {},
    ),
    "names without tokens": ({"bos_token": "", "eos_token": "", "unk_token": "", "add_bos_token": True}, {}),
    "other names": ({"bos_token": "</s>", "eos_token": {"__type": "AddedToken", "content": "<s>", **TOKEN}}, {}),
}


@pytest.mark.parametrize("name", ADDED)
def test_special_and_added_tokens_of_a_llama(name: str, case: Callable[..., Case]) -> None:
    config, files = ADDED[name]
    made = case({**LLAMA, "legacy": False, **config}, tokenizer__model=train(), **files)
    ours = made.ours
    assert_same_everywhere(ours, made.back, HARD)
    if name == "names without tokens":
        # transformers 5 recurses without end on them
        assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
        return
    peer = made.peer
    # With a list of special tokens in the config, transformers 5 drops the model's user-defined pieces
    listed = "additional_special_tokens" in config
    assert_same_everywhere(ours, peer, [text for text in HARD if not listed or "<tool>" not in text])
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, key) == getattr(peer, key)
        assert getattr(ours, f"{key}_id") == getattr(peer, f"{key}_id")


FLAGS = {"<tool>": "rstrip", "<pad>": "lstrip", "<x>": "single_word", "e\u0301": "normalized", "<N>": "lstrip"}
DECODER = {
    str(700 + index): {"content": text, **TOKEN, "special": index % 2 == 0, flag: True}
    for index, (text, flag) in enumerate(FLAGS.items())
} | {"0": {"content": "<|endoftext|>", "special": True, **TOKEN}}
BYTE_LEVEL: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "gpt2": ({"tokenizer_class": "GPT2Tokenizer"}, {}),
    "gpt2 by model type": (None, {"config__json": {"model_type": "gpt2"}}),
    "gpt2 by config.json": (None, {"config__json": {"tokenizer_class": "GPT2Tokenizer"}}),
    "gpt2 with prefix and bos": (
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": True,
            "add_bos_token": True,
            "bos_token": "<|im_end|>",
        },
        {},
    ),
    "gpt2 of old": (
        {"tokenizer_class": "GPT2Tokenizer"},
        {
            "special_tokens_map__json": {"eos_token": {"content": "<|im_end|>", **TOKEN, "lstrip": True}},
            "added_tokens__json": {"<x>": 700, "<pad>": 701},
        },
    ),
    "qwen2": (
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "bos_token": None,
            "added_tokens_decoder": DECODER,
            "additional_special_tokens": ["<x>", "<N>"],
        },
        {},
    ),
    "qwen2 fast": ({"tokenizer_class": "Qwen2TokenizerFast", "add_eos_token": True}, {}),
    "pythia": ({"tokenizer_class": "GPTNeoXTokenizer", "added_tokens_decoder": DECODER, "add_eos_token": True}, {}),
    "cohere": (
        {
            "tokenizer_class": "CohereTokenizer",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "add_bos_token": True,
            **dict.fromkeys(("unk_token", "pad_token", "cls_token", "sep_token", "mask_token")),
        },
        {},
    ),
    "codegen": ({"tokenizer_class": "CodeGenTokenizer", "added_tokens_decoder": DECODER}, {}),
}
BYTE_LEVEL_HARD = hard.hard_text(3, 1200, special=["<|endoftext|>", "<|im_end|>", "<tool>", "<pad>", "<x>", "<N>"])


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_bpe_is_transformers_to_the_id(name: str, byte_level: Callable[..., Case]) -> None:
    config, files = BYTE_LEVEL[name]
    made = byte_level(config, **files)
    peer = made.peer
    assert_same_everywhere(made.ours, peer, BYTE_LEVEL_HARD)
    assert_same_everywhere(made.ours, made.back, BYTE_LEVEL_HARD)
    assert (made.ours.bos_token, made.ours.eos_token) == (peer.bos_token, peer.eos_token)
    declared = {index: repr(token) for index, token in peer.added_tokens_decoder.items() if str(token) != "<|padding|>"}
    assert {index: repr(token) for index, token in made.ours.backend.get_added_tokens_decoder().items()} == declared


def test_the_reader_sees_what_sentencepiece_sees(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train())
    model, peer = read_sentencepiece(tmp_path / "tokenizer.model"), sentencepiece.SentencePieceProcessor()
    peer.LoadFromSerializedProto(train())
    assert len(model.pieces) == peer.get_piece_size() == 700
    for index, (text, score, kind) in enumerate(model.pieces):
        assert (text, score) == (peer.id_to_piece(index), peer.get_score(index))
        flags = (peer.is_unknown(index), peer.is_control(index), peer.is_unused(index), peer.is_byte(index))
        assert flags == (kind == 2, kind == 3, kind == 5, kind == 6)
