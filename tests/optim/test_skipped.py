"""A step whose gradient norm is not finite changes no bit of weights and state, on every backend; the next one does
what it would have done without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smedjan.checkpoint.raw import RawTensor
from smedjan.graph.rewrite import cse, decompose, distinct_outputs, prune
from smedjan.optim import base
from smedjan.optim.adafactor import Adafactor
from smedjan.optim.adamw import AdamW
from smedjan.optim.base import Optimizer
from smedjan.optim.lion import Lion
from smedjan.optim.muon import Muon
from smedjan.optim.sophia import Sophia
from smedjan.runtime.select import backend

SHAPES = {"w": (16, 32), "b": (3,), "u": (512,)}
SEED = 2**40 + 7
BACKENDS = ("torch_reference", "cpu_native", "cuda_triton", "mlx_metal")

CHOICES: dict[str, tuple[Optimizer, str]] = {
    "float32": (AdamW(clip=0.5, weight_decay=0.1), "float32"),
    "unclipped": (AdamW(clip=0.0), "float32"),
    "master": (AdamW(master=True), "bfloat16"),
    "bfloat16 state": (AdamW(master=True, state_dtype="bfloat16"), "bfloat16"),
    "stochastic": (AdamW(rounding="stochastic"), "bfloat16"),
    "8 bits": (AdamW(state_dtype="8bit", master=True), "bfloat16"),
    "muon": (Muon(master=True, weight_decay=0.1), "bfloat16"),
    "muon, 8 bits": (Muon(state_dtype="8bit"), "float32"),
    "lion": (Lion(weight_decay=0.1), "float32"),
    "lion, 8 bits": (Lion(state_dtype="8bit", rounding="stochastic"), "bfloat16"),
    "adafactor": (Adafactor(weight_decay=0.1, master=True), "bfloat16"),
    "sophia": (Sophia(weight_decay=0.1), "float32"),
}
CODED = ("muon, 8 bits", "lion, 8 bits")
"""What cuda_triton has no kernels for: AdamW's buckets alone take state of 8 bits there."""
LACKING = {"cuda_triton": CODED}
CASES = [(choice, on) for choice in CHOICES for on in BACKENDS if choice not in LACKING.get(on, ())]


POISONS = {"torch_reference": (float("inf"), float("nan"))}
"""NaN alone where a case takes long: it is the one that comparisons and products with zero let through."""


@pytest.mark.parametrize(
    ("choice", "on", "poison"), [(*case, each) for case in CASES for each in POISONS.get(case[1], (float("nan"),))]
)
def test_nothing_changes(choice, on, poison, monkeypatch):
    monkeypatch.setattr(base, "EIGHT_BIT_FROM", 256)
    optimizer, dtype = CHOICES[choice]
    where = backend(on)
    specs = {name: (shape, dtype) for name, shape in SHAPES.items()}
    graph = optimizer.graph(specs, exact=where.exact, buckets=not where.exact)
    program = where.program(distinct_outputs(cse(prune(decompose(graph, where.rules.has)))))
    generator = torch.Generator().manual_seed(5)

    def drawn() -> dict[str, Any]:
        arrays = {
            name: torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for name, shape in SHAPES.items()
        }
        return {name: where.from_raw(raw_of(array)) for name, array in arrays.items()}

    live = drawn()
    start = {name: where.zeros(*spec) for name, spec in optimizer.state(specs).items()}
    for name in start:
        if name.partition(".")[0] in base.COPIES:
            widened = where.to_raw(live[name.partition(".")[2]])
            start[name] = where.from_raw(raw_of(torch_of(widened).float()))
    live |= start

    def step(number: int, taken: int, poisoned: float | None = None) -> dict[str, torch.Tensor]:
        nonlocal live
        grads = drawn()
        if poisoned is not None:
            array = torch_of(where.to_raw(grads["b"])).clone()
            array[1] = poisoned
            grads["b"] = where.from_raw(raw_of(array))
        scalars = optimizer.scalars(specs, lr=1e-2, step=taken, seed=SEED)
        live = program({**live, **{f"grad.{n}": g for n, g in grads.items()}, **scalars})
        norm = float(torch_of(where.to_raw(live.pop("grad_norm"))))
        assert (poisoned is None) == (norm == norm and abs(norm) != float("inf")), number
        return {name: torch_of(where.to_raw(array)).clone() for name, array in live.items()}

    first = step(1, 1)
    assert all(array.isfinite().all() for array in first.values() if array.is_floating_point())
    skipped = step(2, 2, poison)
    assert first.keys() == skipped.keys()
    for name, array in first.items():
        assert torch.equal(bits(array), bits(skipped[name])), name
    moved = step(3, 2)
    assert all(not torch.equal(bits(array), bits(moved[name])) for name, array in first.items() if name in SHAPES)


def bits(array: torch.Tensor) -> torch.Tensor:
    return array.reshape(-1).view(torch.uint8)


def raw_of(array: torch.Tensor) -> RawTensor:
    return backend("torch_reference").to_raw(array)


def torch_of(raw: RawTensor) -> torch.Tensor:
    return backend("torch_reference").from_raw(raw)
