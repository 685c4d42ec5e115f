"""Rows of new tokens have the distribution that transformers' `resize_token_embeddings` draws them from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smedjan.checkpoint.raw import RawTensor
from smedjan.hf.load import open_model
from smedjan.hf.new_tokens import EPSILON, grown, with_rows

ROWS, DIM, NEW = 40, 6, 20_000


def old_rows() -> np.ndarray:
    mix = np.random.default_rng(1).normal(size=(DIM, DIM))
    return (np.random.default_rng(2).normal(size=(ROWS, DIM)) @ mix + 0.1).astype(np.float32)


def draw(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    made = grown(RawTensor.of(rows), ROWS + NEW, ROWS, np.random.default_rng(seed))
    return np.frombuffer(made.data, dtype=np.float32).reshape(made.shape)


def test_the_rows_are_normal_around_the_mean():
    """Mean and covariance of many draws, each entry within five deviations of transformers' own parameters, and as near
    to them as transformers' draws are."""
    # Wide enough that float32 shows the spread: in units of the covariance, the size of the rows does not matter.
    rows = old_rows() - old_rows().mean(0)
    made = draw(rows)
    np.testing.assert_array_equal(made[:ROWS], rows)
    covariance = np.cov(rows.astype(np.float64).T, bias=True)
    drawn = made[ROWS:].astype(np.float64)
    deviation = np.sqrt(EPSILON * np.diag(covariance) / NEW)
    assert (np.abs(drawn.mean(0) - rows.mean(0)) < 5 * deviation + 1e-7).all()
    found = np.cov(drawn.T) / EPSILON
    diagonal = np.diag(covariance)
    spread = np.sqrt((np.outer(diagonal, diagonal) + covariance**2) / NEW)
    assert (np.abs(found - covariance) < 5 * spread).all()
    peer = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, hidden_size=DIM, num_hidden_layers=0, num_attention_heads=1))
    peer.model.embed_tokens.weight.data = torch.from_numpy(rows.copy())
    peer.resize_token_embeddings(ROWS + NEW)
    theirs = np.cov(peer.model.embed_tokens.weight.detach().numpy()[ROWS:].astype(np.float64).T) / EPSILON
    assert (np.abs(found - theirs) < 5 * np.sqrt(2) * spread).all()


def test_they_are_of_the_seed():
    rows = old_rows()
    np.testing.assert_array_equal(draw(rows), draw(rows))
    assert not np.array_equal(draw(rows), draw(rows, seed=1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_vocabulary_grows_only_as_far_as_it_must(tmp_path: Path, tied: bool):
    """Ids that the matrix has rows for get them, drawn anew; the rows below stay, bit for bit, in both matrices."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    files = open_model(tmp_path)
    for ids, vocab in (((45, 46), 50), ((49, 50), 51)):
        made = with_rows(files, ids, seed=3)
        assert made.config.vocab_size == made.data["vocab_size"] == vocab
        for name in {made.config.embedding, made.config.head}:
            old, new = (np.frombuffer(f.tensors[name].data, dtype=np.float32).reshape(-1, 16) for f in (files, made))
            np.testing.assert_array_equal(new[: ids[0]], old[: ids[0]])
            np.testing.assert_allclose(
                new[ids[0] :], np.broadcast_to(old[: ids[0]].mean(0), new[ids[0] :].shape), atol=1e-5
            )
