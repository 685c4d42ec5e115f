"""The schedules are transformers', step by step and to the bit of a Python float."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
)

from smedjan.optim.schedule import WSD_DECAY, factor

CYCLES = 3
LENGTHS = [(20, 0), (20, 3), (7, 7), (1, 0), (101, 50)]


def peer(schedule: str, total: int, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if schedule == "constant":
        made = get_constant_schedule_with_warmup(optimizer, warmup)
    elif schedule == "linear":
        made = get_linear_schedule_with_warmup(optimizer, warmup, total)
    elif schedule == "inverse_sqrt":
        made = get_inverse_sqrt_schedule(optimizer, warmup)
    elif schedule == "cosine_with_restarts":
        made = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, total, CYCLES)
    else:
        made = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    return [made.lr_lambdas[0](step) for step in range(total + 3)]


@pytest.mark.parametrize(("total", "warmup"), LENGTHS)
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "cosine_with_restarts", "inverse_sqrt"])
def test_factor_is_transformers(schedule, total, warmup):
    ours = [factor(schedule, step, total=total, warmup=warmup, cycles=CYCLES) for step in range(total + 3)]
    theirs = peer(schedule, total, warmup)
    # Past the end transformers lets a cosine rise again; nobody trains there.
    assert ours[: total + 1] == theirs[: total + 1]


@pytest.mark.parametrize(("total", "warmup"), LENGTHS)
def test_wsd_warms_up_holds_and_decays_to_zero(total, warmup):
    made = [factor("wsd", step, total=total, warmup=warmup) for step in range(total + 1)]
    decay = math.ceil(WSD_DECAY * max(1, total - warmup))
    for step, value in enumerate(made):
        if step < warmup:
            assert value == step / warmup
        elif step <= total - decay:
            assert value == 1.0
        else:
            assert value == pytest.approx((total - step) / decay, abs=1e-15)
    assert made[total] == 0.0
