"""Equality to the bit is a test that can fail: each small mistake here breaks it."""

from __future__ import annotations

import pytest
import torch

from smedjan.models import decoder
from smedjan.ops.norm import rms_norm
from tests.conftest import make_batch, make_peer, make_session

NAME = "model.layers.0.self_attn.q_proj.weight"


def _equal(peer, session, batch) -> bool:
    peer.zero_grad()
    out = peer(**batch.peer)
    out.loss.backward()
    logits = session.logits(batch)
    _, grads = session.micro(batch, [NAME], num_items=batch.trained_tokens)
    return torch.equal(logits, out.logits.detach()) and torch.equal(
        grads[NAME], dict(peer.named_parameters())[NAME].grad
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10001.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10001.0}},
        {"rms_norm_eps": 2e-6},
    ],
    ids=["rope_theta", "eps"],
)
def test_a_wrong_number(changes):
    peer, batch = make_peer(), make_batch()
    assert _equal(peer, make_session(peer), batch)
    assert not _equal(peer, make_session(peer, **changes), batch)


def test_a_dropped_mask():
    peer, batch = make_peer(), make_batch("left")
    assert _equal(peer, make_session(peer), batch)
    batch.kind = "causal"
    assert not _equal(peer, make_session(peer), batch)


def test_an_untied_head():
    peer, batch = make_peer(tie_word_embeddings=True), make_batch()
    assert _equal(peer, make_session(peer), batch)
    session = make_session(peer, tie_word_embeddings=False)
    torch.manual_seed(9)
    session.parameters["lm_head.weight"] = torch.randn_like(peer.lm_head.weight) * 0.2
    assert not _equal(peer, session, batch)


def test_the_weight_before_the_cast(monkeypatch):
    peer, batch = make_peer(dtype="bfloat16"), make_batch()
    assert _equal(peer, make_session(peer), batch)
    monkeypatch.setattr(decoder, "rms_norm", lambda x, w, **attrs: rms_norm(x, w, **{**attrs, "weight_cast": "after"}))
    assert not _equal(peer, make_session(peer), batch)


def test_the_order_of_a_fan_in(monkeypatch):
    """q, k and v read one tensor: projected in another order, the gradients below are summed in another order."""
    peer, batch = make_peer(), make_batch()
    assert _equal(peer, make_session(peer), batch)

    def early(self, x, number, plain=decoder.Decoder._heads, role=decoder.Decoder._role):
        made = {each: role(self, x, number, each) for each in "vqk"}
        monkeypatch.setattr(self, "_role", lambda y, layer, name: made.get(name) or role(self, y, layer, name))
        found = plain(self, x, number)
        monkeypatch.undo()
        monkeypatch.setattr(decoder.Decoder, "_heads", early)
        return found

    monkeypatch.setattr(decoder.Decoder, "_heads", early)
    assert not _equal(peer, make_session(peer), batch)
