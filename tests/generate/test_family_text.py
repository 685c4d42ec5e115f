"""Greedy text of every family is transformers', token for token, well past the sliding window."""

from __future__ import annotations

import pytest
import torch

from smedjan.generate import generate
from tests.families import ALL, CASES, make_model, make_session_of

PROMPT = [5, 80, 13, 7, 44, 21, 9]


def theirs(model, count: int) -> list[int]:
    ids = torch.tensor([PROMPT])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return made[0, len(PROMPT) :].tolist()


def one_each() -> list[tuple[str, str]]:
    """The first case of each family, and what switches while it generates."""
    return [pair for pair in ALL if pair[1] == next(iter(CASES[pair[0]])) or "rope" in pair[1] or "window" in pair[1]]


@pytest.mark.parametrize(("family", "case"), one_each(), ids=lambda value: value)
def test_greedy_is_transformers(family, case):
    model = make_model(family, CASES[family][case], attention="eager")
    session = make_session_of(model, attention="eager")
    count = min(20, session.config.max_position_embeddings - len(PROMPT))
    assert list(generate(session, PROMPT, max_new_tokens=count)) == theirs(model, count)
