"""A tiny Llama's training step on a fast backend, on torch_reference and in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from smedjan.backends.torch_reference import TorchReference
from smedjan.graph.program import Program
from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session
from tests.backends.cpu_native.fused_cases import Float64
from tests.conftest import make_batch, make_peer, make_session
from tests.tolerances import UNIT_ROUNDOFF, assert_near, error

SEEDS = (1, 2, 3)
LOSS_ROWS = 14
"""Most trained rows of a batch: terms of the loss's sum."""
KINDS = ("none", "left", "right", "packed")


def batch_of(kind: str, seed: int = 1) -> SimpleNamespace:
    """Two rows of 7 tokens: whole, padded on a side, or of several documents each."""
    batch = make_batch("none" if kind == "packed" else kind, seed=seed)
    if kind == "packed":
        batch.kind = "packed"
        batch.segment_ids = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2]])
        batch.position_ids = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0]])
    return batch


def session_on(on: Any, *, dtype: str = "float32", lora: Lora | None = None, **changes: Any) -> Session:
    session = make_session(make_peer(dtype=dtype, num_key_value_heads=2, **changes), lora=lora)
    session.backend = on
    if lora is not None:
        generator = torch.Generator().manual_seed(4)
        shapes = lora.shapes({name: tuple(array.shape) for name, array in session.parameters.items()})
        for name, shape in shapes.items():
            session.parameters[name] = torch.randn(shape, generator=generator) * 0.2
    if isinstance(on, Float64):
        session.parameters = {name: array.double() for name, array in session.parameters.items()}
    return session


def trained(session: Session) -> list[str]:
    return [name for name in session.parameters if session.lora is None or ".lora_" in name]


def check_step(name: str, kind: str, dtype: str, lora: Lora | None, **changes: Any) -> None:
    """Logits, losses and every gradient of two accumulated micro-batches, at every seed.

    Tensors are held by `assert_near`. A loss is a single number, bounded through its logits: d loss / d logits of a row
    has 1-norm 2 (1 - p) at most, so that |fast - wide| <= 2 max|logits error|, and the float32 sum's own 2 n u |wide|.
    """
    fast, wide, plain = (
        _results(session_on(on, dtype=dtype, lora=lora, **changes), kind)
        for on in (backend(name), Float64(), TorchReference())
    )
    assert fast.keys() == wide.keys() == plain.keys()
    for key in wide:
        assert fast[key].dtype == plain[key].dtype, key
        if not key.startswith("loss"):
            assert_near(key, fast[key], wide[key].double(), plain[key])
    if lora is not None and lora.dropout > 0:
        return  # the logits are made without dropout, the losses with it
    for key in (key for key in wide if key.startswith("loss")):
        logits = key.replace("loss", "logits")
        bound = 2 * error(fast[logits], wide[logits]) + 2 * LOSS_ROWS * UNIT_ROUNDOFF[torch.float32] * abs(wide[key])
        off = error(fast[key], wide[key])
        assert off <= bound, f"{key}: error {off:.3e} > bound {bound:.3e}"


def _results(session: Session, kind: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    names = trained(session)
    for seed in SEEDS:
        totals = None
        for micro in (0, 1):
            batch = batch_of(kind, seed + 10 * micro)
            key = (1, 2, seed, micro)
            loss, totals = session.micro(batch, names, num_items=9, totals=totals, dropout_key=key)
            found[f"loss {micro} {seed}"] = loss
            logits = session.logits(batch)
            # What a padding token gives is nobody's.
            seen = logits[torch.from_numpy(batch.attention_mask) != 0] if batch.kind == "padded" else logits
            found[f"logits {micro} {seed}"] = seen
        assert totals is not None
        found.update({f"{name} {seed}": array.clone() for name, array in totals.items()})
    return found


def programs(name: str, *, lora: Lora | None = None, dtype: str = "float32") -> list[Program]:
    """Every program of a training step: each kind of batch, alone and accumulated, and the update."""
    session = session_on(backend(name), dtype=dtype, lora=lora)
    names = trained(session)
    made = []
    for kind in KINDS:
        form = session.form(batch_of(kind), rows=4)
        made += [session.micro_program(form, names, accumulate=again) for again in (False, True)]
    shapes = {n: (tuple(session.parameters[n].shape), str(session.parameters[n].dtype)[6:]) for n in names}
    return [*made, session.finish(AdamW(clip=1.0).graph(shapes, exact=False, buckets=True))]
