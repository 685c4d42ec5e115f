"""Learning-rate schedules: a factor of the peak rate for each step, in Python floats, as transformers computes them."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "inverse_sqrt", "wsd")
WSD_DECAY = 0.2
"""Share of the steps after warm-up over which "wsd" (warm-up, stable, decay; Hu et al. 2024) falls linearly to zero."""


INVERSE_SQRT = 10_000
"""Steps after which "inverse_sqrt" has fallen by a half root where there is no warm-up, whose length is that time else
(Zhai et al. 2022, "Scaling Vision Transformers")."""


def factor(schedule: str, step: int, *, total: int, warmup: int, cycles: int = 1) -> float:
    """The factor for `step`, counted from 0: rises over `warmup` steps, then follows the schedule to `total`.

    "cosine_with_restarts" falls to zero `cycles` times (SGDR: Loshchilov & Hutter 2017, of equal cycles).
    """
    assert schedule in SCHEDULES, schedule
    if step < warmup:
        return step / max(1, warmup)
    after, length = step - warmup, max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, (total - step) / length)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (after / length))))
    if schedule == "cosine_with_restarts":
        progress = after / length
        return 0.0 if progress >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0))))
    if schedule == "inverse_sqrt":
        scale = warmup or INVERSE_SQRT
        return 1.0 / math.sqrt((step + (scale - warmup)) / scale)
    if schedule == "wsd":
        return min(1.0, max(0.0, (total - step) / max(1, math.ceil(WSD_DECAY * length))))
    return 1.0
