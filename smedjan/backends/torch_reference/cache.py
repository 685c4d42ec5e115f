"""The key/value cache: static buffers, read as slices. A slice gives the bits of transformers' growing cat."""

from __future__ import annotations

from smedjan.backends.torch_reference.table import RULES


@RULES.rule("kv_write")
def kv_write(cache, kv, start):
    cache[:, :, start : start + kv.shape[2]] = kv
    return cache


@RULES.rule("kv_read")
def kv_read(cache, end, *, seq, window):
    return cache[:, :, max(0, end - seq - window + 1) if window else 0 : end]
