"""Fusion changes no number: every family's fused graph, taken apart again and run in float64, is the graph it was."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from smedjan.graph.node import Graph
from smedjan.graph.op import OPS
from smedjan.ops import flash, lora, norm, offload, rope  # noqa: F401  (declare what is fused)
from smedjan.passes.fuse import fuse
from smedjan.passes.fuse_backward import fuse_backward
from smedjan.passes.lora import Lora
from smedjan.runtime.session import Cache, Session
from tests.backends.cpu_native.fused_cases import WIDE, Float64
from tests.conftest import make_batch
from tests.families import ALL, CASES, make_model, make_session_of

ROUNDS = [(family, case, "none") for family, case in ALL] + [
    (family, next(iter(cases)), kind) for family, cases in CASES.items() for kind in ("left", "packed")
]
FUSED = {"linear_group", "lora_linear_group", "add_rms_norm", "add_layer_norm", "qk_norm_rope", "flash_attention"}
FUSED |= {"cached_attention", "linear_dx_add", "linear_dw_add", "linear_group_dw_add"}


class Plain(Float64):
    """Caches in float64 too."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64)


class Fusing(Plain):
    """float64 again, over graphs that were fused first."""

    exact = False

    def fuse(self, graph: Graph) -> Graph:
        self.fused = fuse(graph, lambda op: op in FUSED and op in OPS)
        return self.fused

    def program(self, graph: Graph, pool: Any = None) -> Any:
        return super().program(fuse_backward(graph, lambda op: WIDE.has(_node(op))), pool)


def _node(op: str) -> Any:
    return SimpleNamespace(op=SimpleNamespace(name=op))


def batch_of(kind: str) -> SimpleNamespace:
    batch = make_batch("none" if kind == "packed" else kind)
    if kind == "left":
        # What a padding token sees is nothing: eager attention makes the mean of all of that, the fused one zeros.
        batch.labels[batch.attention_mask == 0] = -100
    if kind == "packed":
        batch.kind = "packed"
        batch.segment_ids = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2]])
        batch.position_ids = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0]])
    return batch


def wide(session: Session, on: Any) -> Session:
    parameters = {name: array.double() for name, array in session.parameters.items()}
    return replace(session, backend=on, parameters=parameters)


def results(session: Session, kind: str) -> dict[str, torch.Tensor]:
    batch = batch_of(kind)
    names = [name for name in session.parameters if session.lora is None or ".lora_" in name]
    loss, first = session.micro(batch, names, num_items=9)
    again, totals = session.micro(batch, names, num_items=9, totals={n: g.clone() for n, g in first.items()})
    made = {"loss": loss, "again": again, "logits": session.logits(batch), **totals}
    if kind != "packed":
        cache = Cache(session, batch=2, capacity=16)
        mask = batch.attention_mask
        for step in range(3):
            ids = batch.input_ids if step == 0 else batch.input_ids[:, :1]
            if step and mask is not None:
                mask = np.concatenate([mask, np.ones((2, 1), dtype=mask.dtype)], axis=1)
            made[f"token {step}"] = cache.feed(ids, mask)
    return made


@pytest.mark.parametrize(("family", "case", "kind"), ROUNDS, ids=str)
def test_a_fused_graph_is_the_graph_it_was(family, case, kind):
    session = make_session_of(make_model(family, CASES[family][case], attention="eager"), attention="eager")
    fusing = Fusing()
    found, expected = results(wide(session, fusing), kind), results(wide(session, Plain()), kind)
    assert found.keys() == expected.keys()
    seen = torch.from_numpy(make_batch(kind if kind == "left" else "none").attention_mask) if kind == "left" else None
    for name, value in expected.items():
        ours = found[name]
        if name == "logits" and seen is not None:
            ours, value = ours[seen != 0], value[seen != 0]
        if name == "token 0" and seen is not None:
            ours, value = ours[seen != 0], value[seen != 0]
        torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("other", [{}, {"ranks": (("v_proj", 2),)}, {"alphas": (("v_proj", 5.0),)}], ids=str)
def test_adapters_of_one_rank_and_scale_are_grouped(other):
    """q, k and v where all are alike, gate and up in any case; the numbers are the same either way."""
    model = make_model("llama", next(iter(CASES["llama"].values())), attention="eager")
    session = make_session_of(model, attention="eager")
    targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    session.lora = Lora(rank=3, alpha=6.0, dropout=0.0, targets=targets, **other)
    generator = torch.Generator().manual_seed(4)
    shapes = session.lora.shapes({name: tuple(array.shape) for name, array in session.parameters.items()})
    session.parameters |= {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    fusing = Fusing()
    found, expected = results(wide(session, fusing), "none"), results(wide(session, Plain()), "none")
    grouped = [node for node in fusing.fused.nodes if node.op.name == "lora_linear_group"]
    assert {len(node.attrs["adapted"]) for node in grouped} == ({2} if other else {2, 3})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
