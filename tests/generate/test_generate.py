"""Decoding is transformers': the same greedy tokens, and one place where the context ends."""

from __future__ import annotations

import pytest
import torch

from smedjan.errors import ConfigError
from smedjan.generate import Sampling, generate
from smedjan.runtime.select import backend
from tests.conftest import VOCAB, make_peer, make_session

PROMPTS = [[5], [7, 9, 11, 13, 15], list(range(10, 41))]


def theirs(peer, prompt: list[int], count: int, **settings) -> list[int]:
    ids = torch.tensor([prompt])
    made = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True, **settings
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("on", ["torch_reference", "cpu_native"])
@pytest.mark.parametrize("groups", [6, 2])
def test_greedy_is_transformers(groups, on, prompt):
    peer = make_peer(num_key_value_heads=groups, eos_token_id=None).eval()
    session = make_session(peer)
    session.backend = backend(on)
    made = list(generate(session, prompt, max_new_tokens=20))
    assert made == theirs(peer, prompt, 20)
    assert len(set(made)) > 1  # a model that repeats one token would prove little


def test_greedy_with_a_repetition_penalty_is_transformers():
    peer = make_peer(eos_token_id=None).eval()
    plain = theirs(peer, PROMPTS[1], 20)
    expected = theirs(peer, PROMPTS[1], 20, repetition_penalty=1.7)
    assert expected != plain
    sampling = Sampling(repetition_penalty=1.7)
    assert list(generate(make_session(peer), PROMPTS[1], max_new_tokens=20, sampling=sampling)) == expected


def test_a_stop_token_is_given_and_ends_it():
    peer = make_peer(eos_token_id=None).eval()
    session, prompt = make_session(peer), PROMPTS[1]
    free = list(generate(session, prompt, max_new_tokens=20))
    stop = next(token for token in free[3:] if token not in free[:3])
    made = list(generate(session, prompt, max_new_tokens=20, stop={stop}))
    assert made == free[: free.index(stop) + 1]
    assert made == theirs(peer, prompt, 20, eos_token_id=stop)


def test_prompt_and_new_tokens_fill_the_context_and_no_more():
    peer = make_peer(max_position_embeddings=16, eos_token_id=None).eval()
    session, prompt = make_session(peer), [5, 6, 7, 8, 9, 10]
    assert list(generate(session, prompt, max_new_tokens=10)) == theirs(peer, prompt, 10)
    with pytest.raises(ConfigError, match="6 tokens of prompt and 11 new ones exceed the context of 16") as caught:
        next(generate(session, prompt, max_new_tokens=11))
    assert caught.value.field == "max_new_tokens"


def test_an_empty_prompt_is_an_error():
    with pytest.raises(ConfigError, match="empty") as caught:
        next(generate(make_session(make_peer()), [], max_new_tokens=1))
    assert caught.value.field == "prompt"


def test_no_new_tokens_are_none():
    assert list(generate(make_session(make_peer()), [5], max_new_tokens=0)) == []


def test_a_seed_gives_one_stream_and_another_seed_another():
    session = make_session(make_peer(eos_token_id=None))

    def draw(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.5, top_p=0.99, seed=seed)
        return list(generate(session, PROMPTS[1], max_new_tokens=25, sampling=sampling))

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert all(0 <= token < VOCAB for token in draw(3))


def test_a_stream_resumes_where_its_steps_are_counted_on():
    """A draw depends on (seed, step) alone: the first tokens of a longer run are those of a shorter one."""
    session, sampling = make_session(make_peer(eos_token_id=None)), Sampling(temperature=1.5, seed=11)
    long = list(generate(session, PROMPTS[1], max_new_tokens=12, sampling=sampling))
    assert list(generate(session, PROMPTS[1], max_new_tokens=5, sampling=sampling)) == long[:5]
