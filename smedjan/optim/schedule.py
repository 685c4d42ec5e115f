"""Learning-rate schedules: a factor of the peak rate for each step, in Python floats, as transformers computes them."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine", "wsd")
WSD_DECAY = 0.2
"""Share of the steps after warm-up over which "wsd" (warm-up, stable, decay; Hu et al. 2024) falls linearly to zero."""


def factor(schedule: str, step: int, *, total: int, warmup: int) -> float:
    """The factor for `step`, counted from 0: rises over `warmup` steps, then follows the schedule to `total`."""
    assert schedule in SCHEDULES, schedule
    if step < warmup:
        return step / max(1, warmup)
    after, length = step - warmup, max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, (total - step) / length)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (after / length))))
    if schedule == "wsd":
        return min(1.0, max(0.0, (total - step) / max(1, math.ceil(WSD_DECAY * length))))
    return 1.0
