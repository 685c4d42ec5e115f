"""Pieces of a stream add up to the whole text, and nothing behind a stop string is in them."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from smedjan.generate.text import TextStream

TEXT = "naïve café — 日本語 🙂👩‍👩‍👧 tabs\tand  double  spaces\n\nend. 🙂"


def byte_level() -> Tokenizer:
    """One token a byte: characters of up to four tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def sentencepiece() -> Tokenizer:
    """Llama 2's decoder: spaces are U+2581, unknown characters are bytes, and the first space goes."""
    letters = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.\n\t", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(letters))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_pieces_are_the_text(make):
    tokenizer = make()
    stream, pieces = TextStream(tokenizer.decode), []
    for token in tokenizer.encode(TEXT).ids:
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == TEXT
    assert sum(map(bool, pieces)) > len(TEXT) // 2  # it streams: nearly each character by itself


def test_what_never_becomes_a_character_is_given_at_the_end():
    tokenizer = byte_level()
    stream = TextStream(tokenizer.decode)
    ids = tokenizer.encode("ab🙂").ids[:-1]
    assert "".join(stream.push(token) for token in ids) == "ab"
    assert stream.finish() == tokenizer.decode(ids)[2:] != ""


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_cut_as_a_search_of_the_whole_does(seed):
    """Random text of two letters, so that stop strings begin often without being met."""
    draw, tokenizer = random.Random(seed), byte_level()
    text = "".join(draw.choices("ab", k=60))
    stops = ["".join(draw.choices("ab", k=draw.randint(1, 7))) for _ in range(draw.randint(1, 3))]
    stream, given = TextStream(tokenizer.decode, stops), ""
    for token in tokenizer.encode(text).ids:
        given += stream.push(token)
        if stream.stopped:
            break
    given += stream.finish()
    met = [text.index(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(met)
    # Met as soon as one is whole: of two that overlap, the one that ends first.
    ends = {text.index(stop) + len(stop) for stop in stops if stop in text}
    first = [text.index(stop) for stop in stops if stop in text and text.index(stop) + len(stop) == min(ends)]
    assert given == (text[: min(first)] if met else text) == stream.text
