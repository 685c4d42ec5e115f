"""The key/value cache of decoding: written in place, read up to the host's current length."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor


@op(donates=0)
def kv_write(cache: Tensor, kv: Tensor, start: Tensor) -> Spec:
    """cache[:, :, start : start + T] = kv       cache [B, K, S, D], kv [B, K, T, D], start: host integer"""
    require(cache.shape[:2] == kv.shape[:2] and cache.shape[3] == kv.shape[3], f"kv_write: {cache} {kv}")
    return cache.like()


@op
def kv_read(cache: Tensor, end: Tensor, *, seq: int = 0, window: int = 0) -> Spec:
    """y = cache[:, :, start:end], start = max(0, end - seq - window + 1) where there is a window, else 0

    seq: new tokens, the last of those in the cache. With a window, that is what they can see, no key more: the number
    of keys decides the bits. The declared shape is the capacity: `end` is known on the host when the program runs.
    """
    return cache.like()
