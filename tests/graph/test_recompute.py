"""The memory planner: the same bits in less memory, and nothing done twice while all fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smedjan.backends.torch_reference import TorchReference
from smedjan.graph.liveness import peak_bytes
from smedjan.graph.node import Graph
from smedjan.graph.recompute import Decision, fit
from smedjan.ops import offload  # noqa: F401  (declares what the planner emits)
from smedjan.passes.lora import Lora
from tests.conftest import make_batch
from tests.families import CASES, make_model, make_session_of

LORA = Lora(rank=3, alpha=6.0, dropout=0.3, targets=("q_proj", "v_proj", "gate_proj", "down_proj"))


def peak(graph: Graph) -> int:
    return peak_bytes(graph.live_nodes(), graph)


class Fitted(TorchReference):
    """The exact backend with so much memory: a share of what it needs."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.told: list[Decision] = []
        self.peaks: tuple[int, int] = (0, 0)

    def program(self, graph: Graph, pool: Any = None) -> Any:
        before = peak(graph)
        given = sum(tensor.nbytes for tensor in graph.inputs.values())
        made, self.told = fit(graph, budget=given + int(self.share * (before - given)), peak=peak)
        self.peaks = (before - given, peak(made) - given)
        return super().program(made, pool)


def results(on: TorchReference, family: str, lora: Lora | None) -> dict[str, torch.Tensor]:
    session = make_session_of(make_model(family, next(iter(CASES[family].values())), attention="eager"))
    session.backend, session.lora = on, lora
    names = list(session.parameters)
    if lora is not None:
        generator = torch.Generator().manual_seed(4)
        shapes = lora.shapes(session.config.parameter_shapes())
        names = list(shapes)
        session.parameters |= {n: torch.randn(shape, generator=generator) * 0.2 for n, shape in shapes.items()}
    loss, grads = session.micro(make_batch("left", batch=4, seq=60), names, num_items=9, dropout_key=(1, 2, 3, 4))
    return {"loss": loss, **grads}


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.0])
@pytest.mark.parametrize(("family", "lora"), [("llama", None), ("llama", LORA), ("gemma2", None), ("gpt2", None)])
def test_the_same_bits_in_less_memory(family, lora, share):
    expected, on = results(TorchReference(), family, lora), Fitted(share)
    found = results(on, family, lora)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert on.told
    before, after = on.peaks
    assert after < before
    if share == 0.9:
        assert after <= share * before


def test_nothing_is_done_twice_while_all_fits():
    on = Fitted(1.0)
    results(on, "llama", None)
    assert on.told == []
    assert on.peaks[0] == on.peaks[1]


def test_what_is_cheap_goes_first_then_blocks_then_the_host():
    told = {}
    for share in (0.9, 0.5, 0.0):
        on = Fitted(share)
        results(on, "llama", None)
        told[share] = {(d.what, d.of.startswith("layers.")) for d in on.told}
    assert told[0.9] == {("recompute", False)}
    assert ("recompute", True) in told[0.5] | told[0.0]
    assert ("offload", True) in told[0.0]
