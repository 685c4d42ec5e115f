"""Whole training steps of every family are torch.optim.AdamW's and peft's on transformers' model, to the bit.

Full fine-tuning and LoRA beside every linear layer of the blocks, clipped, over accumulated micro-batches of padded
rows; and packed rows, whose documents do not see each other, through the sliding windows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora
from smedjan.train.step import Trainer
from tests.conftest import assert_bits, make_batch
from tests.families import CASES, make_model, make_session_of

STEPS, CLIP = 4, 0.05
ROUNDS = [(family, "float32") for family in CASES] + [
    (family, "bfloat16") for family in ("gemma3_text", "olmo2", "gpt2")
]


def first(family: str, dtype: str = "float32"):
    """transformers' model of the family's first case, and our session over copies of its weights."""
    model = make_model(family, next(iter(CASES[family].values())), dtype=dtype, attention="eager")
    return model, make_session_of(model, attention="eager")


def train(model, trained: dict[str, torch.nn.Parameter], session) -> None:
    """STEPS steps on both sides; the clip acts in some."""
    trainer = Trainer(session, list(trained), AdamW(weight_decay=0.1, clip=CLIP))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1, foreach=False)
    norms = []
    for number in range(1, STEPS + 1):
        batches = [make_batch("right", seq=9, seed=10 * number + micro) for micro in range(2)]
        optimizer.zero_grad()
        items = sum(batch.trained_tokens for batch in batches)
        for batch in batches:
            model(**batch.peer, num_items_in_batch=torch.tensor(items)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP)
        optimizer.step()
        _, ours = trainer.step(batches, number=number, lr=1e-2)
        assert ours == float(norm), f"step {number}"
        norms.append(ours)
    assert max(norms) > CLIP, "the clip never acted"
    for name, parameter in trained.items():
        assert_bits(session.parameters[name], parameter.detach(), name)


@pytest.mark.parametrize(("family", "dtype"), ROUNDS)
def test_full_fine_tuning(family, dtype):
    model, session = first(family, dtype)
    train(model, dict(model.named_parameters()), session)


@pytest.mark.parametrize("family", CASES)
def test_lora_beside_every_linear_layer(family):
    base, session = first(family)
    targets = session.config.linear_layers()
    transposed = session.config.conv1d
    settings = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(targets), bias="none", fan_in_fan_out=transposed
    )
    model = get_peft_model(base, settings).eval()
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    session.lora = Lora(rank=4, alpha=8, dropout=0.0, targets=targets, transposed=transposed)
    assert session.lora.shapes(session.config.parameter_shapes()) == {n: tuple(p.shape) for n, p in trained.items()}
    torch.manual_seed(5)
    for name, parameter in trained.items():
        torch.nn.init.normal_(parameter, std=0.1)
        session.parameters[name] = parameter.detach().clone()
    train(model, trained, session)


@pytest.mark.parametrize("family", CASES)
def test_packed_rows(family):
    """transformers finds documents by positions that restart, where no attention_mask is given."""
    model, session = first(family)
    batch = make_batch(seq=12)
    positions = np.array([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    batch.position_ids, batch.kind, batch.segment_ids = positions, "packed", np.cumsum(positions == 0, axis=1)
    out = model(**batch.peer, position_ids=torch.from_numpy(positions), use_cache=False)
    out.loss.backward()
    assert_bits(session.logits(batch), out.logits.detach(), "logits")
    loss, grads = session.micro(batch, list(session.parameters), num_items=batch.trained_tokens)
    assert_bits(loss, out.loss.detach(), "loss")
    for name, parameter in model.named_parameters():
        assert_bits(grads[name], parameter.grad, name)
