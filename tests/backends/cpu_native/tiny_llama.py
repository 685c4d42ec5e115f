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
from tests.tolerances import UNIT_ROUNDOFF, error

SEEDS = (1, 2, 3)
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
    """Logits, loss and every gradient of two accumulated micro-batches: over `SEEDS`, the mean of each one's

        error / max|reference| <= 2 * r + 2 * u

    r: the largest relative error of any of the plain steps' results. After a whole model one tensor's plain error is
    one draw of what every tensor inherits from the layers around it: a lucky draw bounds nothing, hence r and the mean.
    """
    fast, wide, plain = (
        _results(session_on(on, dtype=dtype, lora=lora, **changes), kind)
        for on in (backend(name), Float64(), TorchReference())
    )
    assert fast.keys() == wide.keys() == plain.keys()
    largest = {key: float(reference.abs().max()) for key, reference in wide.items()}
    relative = max(error(plain[key], wide[key]) / largest[key] for key in wide)
    errors: dict[str, list[float]] = {}
    for key, array in fast.items():
        assert array.dtype == plain[key].dtype, key
        found = error(array, wide[key]) / largest[key] - 2 * UNIT_ROUNDOFF[array.dtype]
        errors.setdefault(key.rpartition(" ")[0], []).append(found)
    for key, found_all in errors.items():
        mean = sum(found_all) / len(found_all)
        assert mean <= 2 * relative, f"{key}: error {mean:.3e} > bound {2 * relative:.3e}"


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
        assert totals is not None
        found.update({f"{name} {seed}": array for name, array in totals.items()})
        if session.lora is None:
            logits = session.logits(batch)
            # What a padding token gives is nobody's.
            found[f"logits {seed}"] = (
                logits[torch.from_numpy(batch.attention_mask) != 0] if batch.kind == "padded" else logits
            )
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
    return [*made, session.finish(AdamW(clip=1.0).graph(shapes, exact=False))]
