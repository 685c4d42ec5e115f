"""Rows decoded together are those decoded one by one, whatever their lengths, stops and settings."""

from __future__ import annotations

import pytest

from smedjan.errors import ConfigError
from smedjan.generate import Sampling, generate, generate_many
from smedjan.generate import batch as module
from smedjan.generate.batch import grouped
from smedjan.runtime.select import backend
from tests.conftest import make_peer, make_session
from tests.families import CASES, make_model, make_session_of

PROMPTS = [[5], [7, 9, 11, 13, 15], list(range(10, 41)), [44, 8], list(range(20, 33)), [7, 9, 11, 13, 16]]
NEW = [20, 3, 20, 0, 17, 20]


def one_by_one(session, **settings) -> list[list[int]]:
    return [list(generate(session, p, max_new_tokens=n, **settings)) for p, n in zip(PROMPTS, NEW, strict=True)]


@pytest.mark.parametrize("on", ["torch_reference", "cpu_native"])
def test_greedy_rows_together_are_those_alone(on):
    session = make_session(make_peer(num_key_value_heads=2, eos_token_id=None))
    session.backend = backend(on)
    alone = one_by_one(session)
    assert len({token for row in alone for token in row}) > 10
    for size in (1, 4, 32):
        assert generate_many(session, PROMPTS, max_new_tokens=NEW, batch_size=size) == alone


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "mistral", "phi3"])
def test_a_family_that_counts_or_masks_otherwise(family):
    """A sliding window, learned positions that end with the context, a rope that changes on the way."""
    case = next((name for name in CASES[family] if "rope" in name), next(iter(CASES[family])))
    session = make_session_of(make_model(family, CASES[family][case], attention="eager"), attention="eager")
    room = session.config.max_position_embeddings
    prompts = [[5], [7, 9, 11, 13, 15], list(range(4, 4 + room - 8))]
    new = [room - 1, 12, 8]
    alone = [list(generate(session, p, max_new_tokens=n)) for p, n in zip(prompts, new, strict=True)]
    assert generate_many(session, prompts, max_new_tokens=new) == alone


def test_sampled_rows_together_are_those_alone():
    session = make_session(make_peer(eos_token_id=None))
    settings = [
        Sampling(temperature=1.2, top_k=9, seed=row, repetition_penalty=1.3 if row % 2 else None)
        for row in range(len(PROMPTS))
    ]
    alone = [
        list(generate(session, p, max_new_tokens=n, sampling=s)) for p, n, s in zip(PROMPTS, NEW, settings, strict=True)
    ]
    assert generate_many(session, PROMPTS, max_new_tokens=NEW, sampling=settings) == alone


def test_stops_end_a_row_and_no_other():
    session = make_session(make_peer(eos_token_id=None))
    free = one_by_one(session)
    stop = {free[0][4], free[4][9]}
    made = generate_many(session, PROMPTS, max_new_tokens=NEW, stop=stop)
    assert made == one_by_one(session, stop=stop)
    assert len(made[0]) < len(free[0])
    cut = generate_many(session, PROMPTS, max_new_tokens=NEW, ended=lambda row, token: row == 4 and token == free[4][2])
    assert [len(row) for row in cut] == [
        len(row) if n != 4 else row.index(free[4][2]) + 1 for n, row in enumerate(free)
    ]


def test_groups_are_the_longest_first_and_hold_what_memory_does():
    lengths = [3, 50, 7, 20, 1, 20]
    assert grouped(lengths, batch_size=2, tokens=1000) == [[1, 3], [5, 2], [0, 4]]
    assert grouped(lengths, batch_size=9, tokens=40) == [[1], [3, 5], [2, 0, 4]]
    assert grouped([], batch_size=2, tokens=9) == []


def test_a_small_budget_of_logits_changes_nothing(monkeypatch):
    session = make_session(make_peer(eos_token_id=None))
    alone, seen = one_by_one(session), []
    monkeypatch.setattr(module, "LOGITS", 70 * session.config.vocab_size)
    made = generate_many(session, PROMPTS, max_new_tokens=NEW, on_row=lambda done, of: seen.append((done, of)))
    assert made == alone
    assert seen == [(2, 6), (6, 6)]


def test_a_row_that_does_not_fit_is_an_error():
    with pytest.raises(ConfigError, match="60 tokens of prompt and 20 new ones, for a context of 64"):
        generate_many(make_session(make_peer()), [[5], [5] * 60], max_new_tokens=[1, 20])
