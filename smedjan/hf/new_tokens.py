"""New tokens: in the tokenizer, and as rows of the embedding and of an untied head.

A new row is drawn around the mean of the old ones, as transformers' `resize_token_embeddings` with `mean_resizing`
draws it (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"):

    row ~ N(m, e S),  m and S mean and covariance of the n old rows X, e = 1e-9;  row = m + sqrt(e / n) (X - m)^T g

with g ~ N(0, I) of n numbers, which needs neither S nor its root. New rows are nearly alike: training parts them. Rows
are of seed and matrix alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers

from smedjan.checkpoint.dtype import convert, to_float32
from smedjan.checkpoint.raw import RawTensor
from smedjan.errors import ConfigError
from smedjan.hf.export import TOKENIZER_FILES
from smedjan.hf.load import ModelFiles, changed
from smedjan.hf.tokenizer import Tokenizer
from smedjan.hf.tokenizer_classes import optional_json

EPSILON = 1e-9
"""Of the covariance of old rows, that of new ones: transformers' number."""

FIELD = "train.new_tokens"


def with_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer that knows `tokens`, and their ids.

    They are found in text as they stand, before any normalizer, and are ordinary: decoded text shows them, as
    transformers' `add_tokens` has it.
    """
    for token in tokens:
        if tokenizer.token_to_id(token) is not None:
            raise ConfigError(f"{token!r} is a token already", field=FIELD, remedy="leave it out")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in tokens])
    ids = [backend.token_to_id(token) for token in tokens]
    assert all(found is not None for found in ids), ids
    return replace(tokenizer, backend=backend), tuple(found for found in ids if found is not None)


def tokenizer_files(tokenizer: Tokenizer, tokens: Sequence[str], ids: Sequence[int]) -> dict[str, bytes]:
    """What the directory of `tokenizer` must say otherwise now that it knows `tokens`."""
    made = {"tokenizer.json": tokenizer.backend.to_str(pretty=True).encode()}
    settings = optional_json(tokenizer.path / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
        new = {str(i): {"content": token, **plain} for token, i in zip(tokens, ids, strict=True)}
        settings["added_tokens_decoder"] = {**settings["added_tokens_decoder"], **new}
        made["tokenizer_config.json"] = _json(settings)
    if (tokenizer.path / "added_tokens.json").is_file():
        known = optional_json(tokenizer.path / "added_tokens.json")
        made["added_tokens.json"] = _json({**known, **dict(zip(tokens, ids, strict=True))})
    return made


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def files_of(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files in a directory."""
    return {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}


def with_rows(files: ModelFiles, ids: Sequence[int], seed: int) -> ModelFiles:
    """The model with rows for those ids. Spare rows that it has for them (a padded vocabulary) are drawn anew."""
    config = files.config
    vocab = max(config.vocab_size, max(ids) + 1)
    made = {}
    for site, name in enumerate(dict.fromkeys((config.embedding, config.head))):
        old = files.tensors[name]
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, site, vocab])))
        made[name] = convert(grown(old, vocab, min(ids), generator), old.dtype)
    return changed(files, {**files.data, "vocab_size": vocab}, made)


def grown(old: RawTensor, vocab: int, first: int, generator: np.random.Generator) -> RawTensor:
    """float32 [vocab, D]: the rows below `first` as they are, drawn ones from there on."""
    rows = to_float32(old).reshape(old.shape)[:first]
    mean = rows.mean(0, dtype=np.float64)
    g = generator.standard_normal((vocab - len(rows), len(rows)))
    # (X - m)^T g, without a copy of X
    spread = (g.astype(np.float32) @ rows).astype(np.float64) - g.sum(1, keepdims=True) * mean
    new = mean + np.sqrt(EPSILON / len(rows)) * spread
    return RawTensor.of(np.concatenate([rows, new.astype(np.float32)]))
