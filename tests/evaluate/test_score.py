"""Log-likelihoods are those of transformers' logits, with one context for each continuation or one for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smedjan.data.formats import Source
from smedjan.data.mask import Example
from smedjan.evaluate import score as module
from smedjan.evaluate.score import example_losses, score_examples, score_pairs
from smedjan.runtime.select import backend
from tests.conftest import VOCAB, make_peer, make_session
from tests.families import CASES, make_model, make_session_of
from tests.tolerances import assert_near

CONTEXTS = ([5], list(range(10, 39)), [7, 9, 11, 13, 15])
CONTINUATIONS = ([20], [21, 22, 23], [4, 30, 31, 32, 33, 34, 35], [96])
PAIRS = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]


def theirs(model, pairs, dtype) -> tuple[torch.Tensor, list[bool]]:
    """[N] sums and whether greedy decoding gives them, each pair by itself in one pass."""
    model, sums, greedy = model.to(dtype), [], []
    for context, continuation in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
        labels = torch.tensor(continuation)
        sums.append(torch.log_softmax(logits, -1)[range(len(labels)), labels].sum())
        greedy.append(bool((logits.argmax(-1) == labels).all()))
    return torch.stack(sums), greedy


@pytest.mark.parametrize("shared", [True, False], ids=["shared prompts", "whole rows"])
@pytest.mark.parametrize("on", ["torch_reference", "cpu_native"])
def test_pairs_are_transformers(on, shared, monkeypatch):
    peer = make_peer(num_key_value_heads=2).eval()
    session = make_session(peer)
    session.backend = backend(on)
    monkeypatch.setattr(module, "SHARED", 1 if shared else 10**9)
    # One continuation that greedy decoding does give.
    with torch.no_grad():
        likeliest = int(peer(torch.tensor([CONTEXTS[1]])).logits[0, -1].argmax())
    pairs = [*PAIRS, (CONTEXTS[1], [likeliest])]
    plain, greedy = theirs(peer, pairs, torch.float32)
    reference, _ = theirs(peer, pairs, torch.float64)
    done: list[int] = []
    found = score_pairs(session, pairs, batch_size=3, on_row=lambda count, of: done.append(count))
    ours = torch.tensor([score.logprob for score in found], dtype=torch.float32)
    assert_near("log-likelihoods", ours, reference, plain)
    assert [score.tokens for score in found] == [len(continuation) for _, continuation in pairs]
    assert [score.greedy for score in found] == greedy
    assert sum(greedy) >= 1
    assert done[-1] == len(pairs)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "mistral", "phi3"])
def test_a_shared_prompt_in_families_that_count_or_mask_otherwise(family, monkeypatch):
    """Padding of blocks meets a sliding window, learned positions that end, a rope that changes with the length."""
    case = next((name for name in CASES[family] if "rope" in name), next(iter(CASES[family])))
    session = make_session_of(make_model(family, CASES[family][case], attention="eager"), attention="eager")
    room = session.config.max_position_embeddings
    context = [5 + index % 60 for index in range(room - 9)]
    pairs = [(context, tokens) for tokens in ([20], [21, 22, 23], [4, 30, 31, 32, 33, 34, 35, 36, 37])]
    monkeypatch.setattr(module, "SHARED", 10**9)
    whole = score_pairs(session, pairs)
    monkeypatch.setattr(module, "SHARED", 1)
    assert [score.logprob for score in score_pairs(session, pairs)] == pytest.approx(
        [score.logprob for score in whole], rel=1e-5
    )


@pytest.mark.parametrize("family", ["gpt2", "mistral", "phi3"])
def test_a_last_token_that_the_context_does_not_hold(family):
    """Predicted from a full context: the same as behind one token less, where that can be asked."""
    session = make_session_of(make_model(family, next(iter(CASES[family].values())), attention="eager"))
    room = session.config.max_position_embeddings
    ids = [5 + index % 60 for index in range(room)]
    (full,) = score_pairs(session, [(ids[:-2], [*ids[-2:], 7])])
    (less,) = score_pairs(session, [(ids[:-2], ids[-2:])])
    (last,) = score_pairs(session, [(ids, [7])])
    assert full.logprob == pytest.approx(less.logprob + last.logprob, rel=1e-5)
    assert full.tokens == 3


def test_a_shared_prompt_is_computed_once(monkeypatch):
    session, fed = make_session(make_peer()), []
    feed = module.Cache.feed

    def counted(cache, ids, *rest, **options):
        fed.append(ids.size)
        return feed(cache, ids, *rest, **options)

    monkeypatch.setattr(module.Cache, "feed", counted)
    score_pairs(session, [(CONTEXTS[1], tokens) for tokens in CONTINUATIONS])
    assert fed == [32, 1, 4, 8, 1]


def examples(lengths) -> list[Example]:
    draw = np.random.default_rng(0)
    return [
        Example(
            input_ids=draw.integers(4, VOCAB, size=length, dtype=np.int32),
            labels_mask=draw.random(length) < 0.6,
            source=Source(file="x", line=1),
        )
        for length in lengths
    ]


def test_losses_of_rows_too_long_for_the_host_are_the_same(monkeypatch):
    session, rows = make_session(make_peer()), examples([9, 40, 3, 64, 17])
    batched = example_losses(session, rows)
    assert batched == [-score.logprob for score in score_examples(session, rows)]
    monkeypatch.setattr(module, "LOGITS", 20 * VOCAB)
    assert example_losses(session, rows) == pytest.approx(batched, rel=1e-5)


def test_losses_need_no_logits_that_training_does_not(monkeypatch):
    """A row over the budget never has its logits fetched."""
    session, rows = make_session(make_peer()), examples([64, 60])
    monkeypatch.setattr(module, "LOGITS", 20 * VOCAB)
    monkeypatch.setattr(type(session), "trained_logits", lambda *_: pytest.fail("logits were fetched"))
    assert all(loss > 0 for loss in example_losses(session, rows))
