"""cpu_native gives up what it keeps where memory is short, and makes light results twice always: the same bits come
out."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends import cpu_native
from smedjan.backends.cpu_native import CpuNative
from smedjan.errors import BackendError
from smedjan.passes.lora import Lora
from tests.conftest import make_batch
from tests.families import CASES, make_model, make_session_of

LORA = Lora(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "gate_proj", "down_proj"))


def step(family: str, lora: Lora | None, memory: int | None = None):
    session = make_session_of(make_model(family, next(iter(CASES[family].values())), attention="eager"))
    session.backend, session.lora, session.memory = CpuNative(), lora, memory
    names = list(session.parameters)
    if lora is not None:
        generator = torch.Generator().manual_seed(4)
        shapes = lora.shapes(session.config.parameter_shapes())
        names = list(shapes)
        session.parameters |= {n: torch.randn(shape, generator=generator) * 0.2 for n, shape in shapes.items()}
    loss, grads = session.micro(make_batch("left", batch=4, seq=60), names, num_items=9)
    (program,) = session.programs.values()
    return program, {"loss": loss, **grads}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("family", "lora"), [("llama", None), ("llama", LORA), ("gemma2", None), ("gpt2", None)])
def test_light_results_are_made_twice(family, lora, monkeypatch):
    less, found = step(family, lora)
    monkeypatch.setattr(cpu_native, "LIGHT", ())
    more, expected = step(family, lora)
    assert_same(found, expected)
    assert less.arena_bytes < more.arena_bytes


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("share", [0.95, 0.85])
def test_less_memory_gives_the_same_bits(lora, share, monkeypatch):
    monkeypatch.setattr(cpu_native, "LIGHT", ())
    program, expected = step("llama", lora)
    given = sum(tensor.nbytes for tensor in program.graph.inputs.values())
    budget = given + int(share * (program.peak_bytes - given))
    fitted, found = step("llama", lora, budget + cpu_native.LIBRARIES)
    assert fitted.memory()
    assert fitted.peak_bytes <= budget
    assert all(each["what"] == "recompute" for each in fitted.memory()), "the host's memory is what is short"
    assert_same(found, expected)


def test_what_fits_nowhere_is_one_error():
    with pytest.raises(BackendError, match=r"a step needs .* GB, recomputed, of 0"):
        step("llama", None, 1000)
