"""The exact backend gives transformers' bits: logits, loss, every gradient, cached decoding, text, and ten steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora
from smedjan.runtime.session import Cache
from smedjan.train.step import Trainer
from tests.conftest import assert_bits, make_batch, make_peer, make_session

GQA = {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16}
BIAS = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 3}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
SHAPES = {"plain": {}, "gqa-tied-wide": GQA, "bias-gqa": BIAS, "linear": LINEAR, "llama3": {**LLAMA3, **GQA}}
DTYPES, ATTENTIONS = ("float32", "bfloat16"), ("sdpa", "eager")


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_gradients_and_decode(shape, dtype, attention, padding):
    peer = make_peer(dtype=dtype, attention=attention, **SHAPES[shape])
    session, batch = make_session(peer, attention=attention), make_batch(padding)
    names = [name for name, _ in peer.named_parameters()]
    out = peer(**batch.peer)
    out.loss.backward()
    assert_bits(session.logits(batch), out.logits.detach(), "logits")
    loss, grads = session.micro(batch, names, num_items=batch.trained_tokens)
    assert_bits(loss, out.loss.detach(), "loss")
    for name, parameter in peer.named_parameters():
        assert_bits(grads[name], parameter.grad, name)
    with torch.no_grad():
        _decode_equal(peer, session, batch)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "a mask of ones"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_in_blocks(dtype, attention, masked):
    """A later block of several tokens sees all before it, as in transformers, and no token after."""
    peer = make_peer(dtype=dtype, attention=attention, num_key_value_heads=2)
    session, ids = make_session(peer, attention=attention), make_batch(seq=9).peer["input_ids"]
    cache, past = Cache(session, batch=len(ids), capacity=32), None
    for start, end in ((0, 4), (4, 7), (7, 9)):
        mask = torch.ones(len(ids), end, dtype=torch.long) if masked else None
        with torch.no_grad():
            theirs = peer(ids[:, start:end], attention_mask=mask, past_key_values=past, use_cache=True)
        past = theirs.past_key_values
        ours = cache.feed(ids[:, start:end].numpy(), None if mask is None else mask.numpy())
        assert_bits(ours, theirs.logits, f"tokens {start} to {end}")


def _decode_equal(peer, session, batch, steps=3):
    ids, mask = batch.peer["input_ids"], batch.peer["attention_mask"]
    theirs = peer(input_ids=ids, attention_mask=mask, use_cache=True)
    cache = Cache(session, batch=len(ids), capacity=32)
    assert_bits(cache.feed(ids.numpy(), None if mask is None else mask.numpy()), theirs.logits, "prefill")
    for step in range(steps):
        ids = theirs.logits[:, -1:].argmax(-1)
        if mask is not None:
            mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.long)], 1)
        theirs = peer(input_ids=ids, attention_mask=mask, past_key_values=theirs.past_key_values, use_cache=True)
        ours = cache.feed(ids.numpy(), None if mask is None else mask.numpy())
        assert_bits(ours, theirs.logits, f"decode {step}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row(dtype):
    peer = make_peer(dtype=dtype, **GQA)
    session, batch = make_session(peer), make_batch(batch=1, seq=11)
    assert_bits(session.logits(batch), peer(**batch.peer).logits.detach(), "logits")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_text(attention):
    peer = make_peer(attention=attention, **GQA)
    session, ids = make_session(peer, attention=attention), make_batch(batch=1).peer["input_ids"]
    theirs = peer.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
    cache, fed, made = Cache(session, batch=1, capacity=32), ids.numpy(), []
    for _ in range(8):
        fed = cache.feed(fed)[:, -1:].argmax(-1).numpy()
        made.append(int(fed[0, 0]))
    assert made == theirs.tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows(dtype, attention):
    """transformers finds documents by positions that restart, where no attention_mask is given."""
    peer = make_peer(dtype=dtype, attention=attention, **GQA)
    session, batch = make_session(peer, attention=attention), make_batch(seq=9)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 0, 1]])
    batch.position_ids, batch.kind = positions, "packed"
    batch.segment_ids = np.cumsum(positions == 0, axis=1)
    out = peer(**batch.peer, position_ids=torch.from_numpy(positions), use_cache=False)
    out.loss.backward()
    assert_bits(session.logits(batch), out.logits.detach(), "logits")
    loss, grads = session.micro(batch, list(session.parameters), num_items=batch.trained_tokens)
    assert_bits(loss, out.loss.detach(), "loss")
    for name, parameter in peer.named_parameters():
        assert_bits(grads[name], parameter.grad, name)


def _peer_step(model, optimizer, parameters, batches, lr, clip):
    optimizer.zero_grad()
    items = sum(batch.trained_tokens for batch in batches)
    for batch in batches:
        model(**batch.peer, num_items_in_batch=torch.tensor(items)).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_steps_of_full_fine_tuning(dtype, micro):
    """Clip that acts, weight decay, a moving rate, accumulated micro-batches: the weights stay equal to the bit."""
    peer = make_peer(dtype=dtype, **GQA)
    session, clip = make_session(peer), 0.5
    names = [name for name, _ in peer.named_parameters()]
    trainer = Trainer(session, names, AdamW(weight_decay=0.1, clip=clip))
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    acted = 0
    for number in range(1, 11):
        batches = [make_batch("right", seed=10 * number + i) for i in range(micro)]
        lr = 1e-2 * number / 10
        norm = _peer_step(peer, optimizer, list(peer.parameters()), batches, lr, clip)
        _, ours = trainer.step(batches, number=number, lr=lr)
        assert ours == float(norm), f"step {number}"
        acted += ours > clip
    assert acted, "the clip never acted"
    for name, parameter in peer.named_parameters():
        assert_bits(session.parameters[name], parameter.detach(), name)


def test_accumulated_gradients():
    peer = make_peer(**GQA)
    session, batches = make_session(peer), [make_batch(seed=1), make_batch("left", seed=2), make_batch(seed=3)]
    names, totals, items = list(session.parameters), None, 30
    for batch in batches:
        peer(**batch.peer, num_items_in_batch=torch.tensor(items)).loss.backward()
        _, totals = session.micro(batch, names, num_items=items, totals=totals)
    for name, parameter in peer.named_parameters():
        assert_bits(totals[name], parameter.grad, name)


PATTERNS = {"rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"q_proj": 3}}


LORAS = {
    "": ({}, GQA),
    "rslora and patterns": ({"use_rslora": True, **PATTERNS}, GQA),
    "dora": ({"use_dora": True}, GQA),
    "dora, rslora and patterns, biases": ({"use_dora": True, "use_rslora": True, **PATTERNS}, BIAS),
}


@pytest.mark.parametrize(("other", "shape"), LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_is_pefts(dtype, other, shape):
    """Logits, adapter gradients and ten AdamW steps, adapters in float32 beside weights of either dtype."""
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    peer = make_peer(dtype=dtype, **shape)
    patterns = {name: tuple(other.get(f"{name[:-1]}_pattern", {}).items()) for name in ("ranks", "alphas")}
    variant = {"rslora": "use_rslora" in other, "dora": "use_dora" in other}
    lora = Lora(rank=4, alpha=8, dropout=0.0, targets=targets, **variant, **patterns)
    session = make_session(peer, lora=lora)
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(targets), bias="none", **other)
    model = get_peft_model(peer, settings, autocast_adapter_dtype=True)
    named = {n.replace(".default", "").replace("vector.weight", "vector"): p for n, p in model.named_parameters()}
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    torch.manual_seed(5)
    for name, parameter in trained.items():
        torch.nn.init.normal_(parameter, std=0.1, mean=1.0 if "magnitude" in name else 0.0)
        session.parameters[name] = parameter.detach().clone()
    shapes = lora.shapes({n: tuple(p.shape) for n, p in session.parameters.items() if "lora" not in n})
    assert shapes == {name: tuple(parameter.shape) for name, parameter in trained.items()}
    batch = make_batch("right")
    out = model(**batch.peer)
    out.loss.backward()
    loss, grads = session.micro(batch, list(trained), num_items=batch.trained_tokens)
    assert_bits(session.logits(batch), out.logits.detach(), "logits")
    assert_bits(loss, out.loss.detach(), "loss")
    for name, parameter in trained.items():
        assert_bits(grads[name], parameter.grad, name)
    trainer = Trainer(session, list(trained), AdamW(clip=0.5))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0, foreach=False)
    for number in range(1, 11):
        batches = [make_batch("right", seed=number)]
        _peer_step(model, optimizer, list(trained.values()), batches, 1e-2, 0.5)
        trainer.step(batches, number=number, lr=1e-2)
    for name, parameter in trained.items():
        assert_bits(session.parameters[name], parameter.detach(), name)
