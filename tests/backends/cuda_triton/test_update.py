"""AdamW's planned update: two launches and one a bucket, op by op to the bit, in memory that it asks for once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned import memory
from smedjan.backends.planned.program import PlannedProgram, Pool
from smedjan.errors import BackendError
from smedjan.graph.program import Program
from smedjan.ops.optimizer import BLOCK
from smedjan.optim import base
from smedjan.optim.adamw import AdamW
from tests.tolerances import UNIT_ROUNDOFF

SHAPES = {"q": (16, 32), "q_bias": (32,), "k": (16, 32), "norm": (17,), "v": (16, 32)}
SEED = 2**40 + 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}

CHOICES = {
    "float32": (AdamW(clip=0.0, weight_decay=0.1), "float32", 1),
    "master": (AdamW(clip=0.0, master=True), "bfloat16", 1),
    "bfloat16 state": (AdamW(clip=0.0, master=True, state_dtype="bfloat16"), "bfloat16", 1),
    "stochastic": (AdamW(clip=0.0, rounding="stochastic"), "bfloat16", 1),
    "8 bits": (AdamW(clip=0.0, state_dtype="8bit", master=True), "bfloat16", 2),
    "8 bits, stochastic": (AdamW(clip=0.0, state_dtype="8bit", rounding="stochastic"), "bfloat16", 2),
    "rates": (AdamW(clip=0.0, rates=(("norm", 0.5), ("q_bias", 0.5))), "float32", 2),
    "clipped": (AdamW(clip=1.0), "float32", 1),
}
"""Optimizer, dtype of the parameters, buckets. A bucket's order is another where parameters were stacked before, and
with it the order of the norm's sum: only unclipped are the bits the same."""


def start(optimizer: AdamW, dtype: str, device: str) -> dict[str, torch.Tensor]:
    """Parameters, of which three lie one behind another as a stacked projection does, and state."""
    generator = torch.Generator().manual_seed(4)
    specs = {name: (shape, dtype) for name, shape in SHAPES.items()}
    params = {n: torch.randn(s, generator=generator).to(DTYPES[dtype]).to(device) for n, s in SHAPES.items()}
    memory.stacked(
        [params[name] for name in "qkv"], lambda *given: torch.empty(given[0], dtype=given[1], device=device)
    )
    state = {
        name: torch.zeros(shape, dtype=DTYPES[kind], device=device)
        for name, (shape, kind) in optimizer.state(specs).items()
    }
    masters = {name: params[name.removeprefix("master.")].float() for name in state if name.startswith("master.")}
    return params | state | masters


def gradients(dtype: str, device: str, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"grad.{n}": torch.randn(s, generator=generator).to(DTYPES[dtype]).to(device) for n, s in SHAPES.items()}


def test_rates_within_a_stack_are_refused(device):
    """q, k and v are one array to a product: two buckets would take them apart anew in every step."""
    optimizer = AdamW(clip=0.0, rates=(("k", 16.0),))
    specs = {name: (shape, "float32") for name, shape in SHAPES.items()}
    program = PlannedProgram(optimizer.graph(specs, exact=False, buckets=True), RULES, Pool(torch.device(device)))
    given = start(optimizer, "float32", device) | gradients("float32", device, 0)
    with pytest.raises(BackendError, match=r"one product takes together.*one learning rate"):
        program({**given, **optimizer.learning_rates(1e-2, specs), "step": 1})


@pytest.mark.parametrize("choice", CHOICES)
def test_a_planned_update_is_op_by_op_and_settles(device, monkeypatch, choice):
    monkeypatch.setattr(base, "EIGHT_BIT_FROM", BLOCK)
    optimizer, dtype, buckets = CHOICES[choice]
    graph = optimizer.graph({n: (s, dtype) for n, s in SHAPES.items()}, exact=False, buckets=True)
    pool = Pool(torch.device(device))
    planned, plain = PlannedProgram(graph, RULES, pool), Program(graph, RULES)
    assert planned.launches() == {"square_sum": 1, "root_of_sum": 1, "adamw": buckets}
    live, other = (start(optimizer, dtype, device) for _ in range(2))
    grads = gradients(dtype, device, 0)
    allocations = []
    for step in range(1, 5):
        fresh = gradients(dtype, device, step)
        for name, array in grads.items():  # a micro-batch's program writes where they lie
            array.copy_(fresh[name])
        rates = optimizer.learning_rates(1e-2 / step, {n: (s, dtype) for n, s in SHAPES.items()})
        scalars: dict[str, Any] = {**rates, "step": step, "seed": SEED}
        made, expected = planned({**live, **grads, **scalars}), plain({**other, **fresh, **scalars})
        norm = torch.cat([grad.double().reshape(-1) for grad in fresh.values()]).norm()
        for name, value in expected.items():
            if name == "grad_norm":
                unit = UNIT_ROUNDOFF[value.dtype]
                assert abs(float(made[name]) - float(norm)) <= (2 * unit + 2.0**-20) * float(norm)
            elif optimizer.clip > 0:
                torch.testing.assert_close(made[name], value, rtol=2.0**-18, atol=2.0**-22)
            else:
                assert torch.equal(made[name], value), name
        live, other = ({n: a for n, a in each.items() if n != "grad_norm"} for each in (made, expected))
        assert memory.follow(live["q"], live["k"])
        assert memory.follow(live["k"], live["v"])
        allocations.append(pool.allocations)
    assert allocations[1:] == allocations[1:2] * 3, "what lies together stays there"
