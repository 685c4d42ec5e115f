"""The key/value cache. Assigning to the array object lets MLX reuse its buffer; positions are host integers."""

from __future__ import annotations

import mlx.core as mx

from smedjan.backends.mlx_metal.table import RULES

HOST_INPUTS = {"kv_write": 2, "kv_read": 1}
"""The input of each op that must be a Python integer when the op runs: its value decides shapes."""


@RULES.rule("kv_write")
def kv_write(cache: mx.array, kv: mx.array, start: int) -> mx.array:
    cache[:, :, start : start + kv.shape[2]] = kv
    return cache


@RULES.rule("kv_read")
def kv_read(cache: mx.array, end: int, *, seq: int, window: int) -> mx.array:
    return cache[:, :, max(0, end - seq - window + 1) if window else 0 : end]
