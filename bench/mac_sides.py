"""One turn of one side of `bench/mac.py`, in a process of its own: what is timed, for smedjan and for mlx-lm.

Training: LoRA of rank 16 on every linear layer of the blocks, alpha 32, AdamW without decay or clipping, rows of random
tokens of which every one is trained. mlx-lm's step is the one of its `tuner/trainer.py`, line for line, over its own
loss, adapters and optimizer. Generation: greedy; the prompt's time ends with the first new token. Peak memory is MLX's
own, weights included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mac_shapes import Shape

RANK, ALPHA, RATE = 16, 32.0, 1e-4
WARM = 2
"""Steps, and whole generations, before what is timed: they hold traces, compilation and the first touch of memory."""


def rows(shape: Shape, steps: int) -> np.ndarray:
    """[steps, batch, length + 1]"""
    size = steps, shape.batch, shape.length + 1
    return np.random.default_rng(1).integers(0, shape.config["vocab_size"], size)


def prompt(shape: Shape) -> list[int]:
    return np.random.default_rng(2).integers(0, shape.config["vocab_size"], shape.prompt).tolist()


def training(side: str, shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
    """First loss, tokens/s of `steps` steps behind the first ones, and the peak."""
    step = _smedjan_step(folder) if side == "smedjan" else _mlx_lm_step(folder, checkpointed=side != "mlx-lm")
    given = rows(shape, WARM + steps)
    mx.reset_peak_memory()
    first, *_ = [step(ids) for ids in given[:WARM]]
    began = time.perf_counter()
    for ids in given[WARM:]:
        step(ids)
    seconds = time.perf_counter() - began
    speed = steps * shape.batch * shape.length / seconds
    return {"loss": first, "tokens_per_s": speed, "peak_bytes": mx.get_peak_memory()}


def generation(side: str, shape: Shape, folder: Path) -> dict[str, Any]:
    """Tokens/s of the prompt and of what follows, and the peak."""
    stream = _smedjan_stream(folder) if side == "smedjan" else _mlx_lm_stream(folder)
    ids = prompt(shape)
    for _ in range(WARM):
        list(stream(ids, 4))
    mx.reset_peak_memory()
    began = time.perf_counter()
    tokens = stream(ids, shape.tokens)
    made = [next(tokens)]
    middle = time.perf_counter()
    made += tokens
    ended = time.perf_counter()
    return {
        "tokens": made,
        "prefill_tokens_per_s": len(ids) / (middle - began),
        "decode_tokens_per_s": (len(made) - 1) / (ended - middle),
        "peak_bytes": mx.get_peak_memory(),
    }


Step = Callable[[np.ndarray], float]
Stream = Callable[[list[int], int], Iterator[int]]


def _smedjan_step(folder: Path) -> Step:
    from smedjan.backends.base import Forms
    from smedjan.hf.load import open_model, open_session
    from smedjan.hf.peft import initial_adapter
    from smedjan.optim.adamw import AdamW
    from smedjan.passes.lora import Lora
    from smedjan.runtime.select import backend
    from smedjan.train.outline import planned_bytes
    from smedjan.train.step import Trainer

    device = backend("mlx_metal")
    session = open_session(open_model(folder), device)
    config = session.config
    lora = Lora(rank=RANK, alpha=ALPHA, dropout=0.0, targets=config.linear_layers(), transposed=config.conv1d)
    adapter = initial_adapter(lora, config.parameter_shapes(), 0)
    session.use(lora, {name: device.from_raw(raw) for name, raw in adapter.items()})
    trainer = Trainer(session, list(adapter), AdamW(master=False, clip=0.0, weight_decay=0.0))
    held: list[Any] = []
    count = 0

    def step(ids: np.ndarray) -> float:
        nonlocal count
        count += 1
        seq = ids.shape[1] - 1
        batch: Any = SimpleNamespace(
            input_ids=ids[:, :-1],
            labels=ids[:, 1:],
            position_ids=np.broadcast_to(np.arange(seq), (len(ids), seq)),
            attention_mask=None,
            segment_ids=None,
            kind="causal",
            tokens=ids[:, 1:].size,
            trained_tokens=ids[:, 1:].size,
        )
        if not held:
            # What finetune tells the device of a run.
            form = session.form(batch, rows=batch.trained_tokens)
            program = session.micro_program(form, trainer.names)
            planned = planned_bytes(trainer, program, forms=Forms(lengths=1, rows=1))
            held.append(device.holding(planned, remedy="leave the shape out"))
            held[0].__enter__()
        return trainer.step([batch], number=count, lr=RATE)[0]

    return step


def _mlx_lm_step(folder: Path, *, checkpointed: bool) -> Step:
    """mlx_lm.lora's `train_model` and mlx_lm.tuner.trainer's `train`, without files and evaluation."""
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, maybe_set_recommended_wired_limit

    maybe_set_recommended_wired_limit()
    model, _ = load_model(folder)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0})
    optimizer = optimizers.AdamW(learning_rate=RATE, weight_decay=0.0, bias_correction=True)
    if checkpointed:
        grad_checkpoint(model.layers[0])
    loss_value_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled(batch: Any) -> Any:
        (loss, count), grad = loss_value_and_grad(model, *batch)
        optimizer.update(model, grad)
        return loss, count

    model.train()

    def step(ids: np.ndarray) -> float:
        lengths = np.array([[1, ids.shape[1] - 1]] * len(ids))
        loss, count = compiled((mx.array(ids), mx.array(lengths)))
        mx.eval(state, loss, count)
        mx.clear_cache()  # as the trainer does, by its default threshold
        return loss.item()

    return step


def _smedjan_stream(folder: Path) -> Stream:
    from smedjan.generate.loop import generate
    from smedjan.hf.load import open_model, open_session
    from smedjan.runtime.select import backend

    session = open_session(open_model(folder), backend("mlx_metal"))
    return lambda ids, count: generate(session, ids, max_new_tokens=count)


def _mlx_lm_stream(folder: Path) -> Stream:
    """`stream_generate` without a tokenizer: its token generator under its wired limit."""
    from mlx_lm.generate import generate_step, generation_stream, wired_limit
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)

    def stream(ids: list[int], count: int) -> Iterator[int]:
        with wired_limit(model, [generation_stream]):
            for token, _ in generate_step(mx.array(ids), model, max_tokens=count):
                yield token

    return stream
