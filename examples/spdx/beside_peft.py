"""Tokens a second of our training step and of the same step in transformers + peft, taken in turns.

Both see the same batches, padded alike, with the same adapters' shapes, AdamW and clipping, on as many threads. Each
round times a few steps of one, then of the other, so that a machine that slows down slows both. That both compute the
same is checked: fresh adapters add nothing, so that the first step's losses must agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isclose

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from smedjan.data.collate import IGNORE, Batch
from smedjan.passes.lora import Lora
from smedjan.train.config import FinetuneConfig
from smedjan.train.parts import Finetune

Step = Callable[[list[Batch], int], float]
"""Takes the micro-batches of a step and its number, gives the loss."""


def interleaved(config: FinetuneConfig, *, rounds: int = 4, steps: int = 2) -> list[tuple[float, float]]:
    """(ours, theirs) in tokens a second, of each round, after one that does not count."""
    parts = Finetune(config)
    sides = (_ours(parts), _theirs(config, parts.lora))
    pairs: list[tuple[float, float]] = []
    first = parts.steps.batches_for_step(0)
    losses = [side(first, 1) for side in sides]
    assert isclose(*losses, rel_tol=1e-3), f"not the same computation: losses {losses}"
    for turn in range(rounds + 1):
        batches = [parts.steps.batches_for_step(number) for number in range(steps)]
        tokens = sum(batch.tokens for step in batches for batch in step)
        # The first round builds programs and warms caches.
        ours, theirs = (_time(side, batches, turn * steps + 1) for side in sides)
        if turn:
            pairs.append((tokens / ours, tokens / theirs))
    return pairs


def _time(side: Step, batches: list[list[Batch]], done: int) -> float:
    began = time.perf_counter()
    for offset, step in enumerate(batches):
        side(step, done + offset + 1)
    return time.perf_counter() - began


def _ours(parts: Finetune) -> Step:
    trainer = parts.trainer()

    def step(batches: list[Batch], number: int) -> float:
        loss, _ = trainer.step(batches, number=number, lr=parts.config.learning_rate)
        return loss

    return step


def _theirs(config: FinetuneConfig, lora: Lora) -> Step:
    optim = config.optim
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    model = get_peft_model(
        base,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
            layers_to_transform=None if lora.layers is None else list(lora.layers),
            task_type="CAUSAL_LM",
        ),
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )

    def step(batches: list[Batch], number: int) -> float:
        total = 0.0
        items = sum(batch.trained_tokens for batch in batches)
        for batch in batches:
            ids = torch.tensor(batch.input_ids)
            # A Batch's labels are shifted already, transformers shifts them itself.
            labels = torch.full_like(ids, IGNORE)
            labels[:, 1:] = torch.tensor(batch.labels[:, :-1])
            mask = None if batch.attention_mask is None else torch.tensor(batch.attention_mask)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, optim.clip)
        adamw.step()
        adamw.zero_grad()
        return total

    return step
