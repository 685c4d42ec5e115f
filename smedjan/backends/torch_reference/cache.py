"""The key/value cache: static buffers, read as slices. A slice gives the bits of transformers' growing cat where heads
begin at aligned addresses, as there; rows of other than whole vectors are copied, since BLAS looks at the address."""

from __future__ import annotations

from smedjan.backends.torch_reference.table import RULES

VECTOR = 8
"""Numbers; with rows of a multiple of it, every head of any cache begins at a multiple of 16 bytes."""


@RULES.rule("kv_write")
def kv_write(cache, kv, start):
    cache[:, :, start : start + kv.shape[2]] = kv
    return cache


@RULES.rule("kv_read")
def kv_read(cache, end, *, seq, window):
    seen = cache[:, :, max(0, end - seq - window + 1) if window else 0 : end]
    return seen.contiguous() if cache.shape[-1] % VECTOR else seen
