"""Philox4x32-10 (Salmon et al. 2011, section 3.2) in unsigned arithmetic, on the device from end to end."""

from __future__ import annotations

import math

import mlx.core as mx

from smedjan.backends.mlx_metal.table import RULES

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def word(value: int | mx.array) -> mx.array:
    """A site is an array where one compiled function draws at several."""
    return value if isinstance(value, mx.array) else mx.array(value, dtype=mx.uint32)


def _mulhilo(constant: int, x: mx.array) -> tuple[mx.array, mx.array]:
    """The high and low words of a 32 x 32 bit product."""
    product = x.astype(mx.uint64) * mx.array(constant, dtype=mx.uint64)
    return (product >> mx.array(32, dtype=mx.uint64)).astype(mx.uint32), product.astype(mx.uint32)


def philox(
    counter: tuple[mx.array, mx.array, mx.array, mx.array], key: tuple[mx.array, mx.array]
) -> tuple[mx.array, ...]:
    """Four uint32 words for each counter; unsigned addition wraps, as the key schedule needs."""
    c0, c1, c2, c3 = mx.broadcast_arrays(*counter)
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(MULTIPLIERS[0], c0)
        hi1, lo1 = _mulhilo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + word(WEYL[0]), k1 + word(WEYL[1])
    return c0, c1, c2, c3


def words_of(key: mx.array, shape: tuple[int, ...], site: int) -> mx.array:
    """The word of each element of `shape`, uint32."""
    seed_low, seed_high, step, micro = (key[i].astype(mx.uint32) for i in range(4))
    count = math.prod(shape)
    index = mx.arange((count + 3) // 4, dtype=mx.uint32)
    words = mx.stack([*philox((index, word(site), step, micro), (seed_low, seed_high))], axis=-1)
    return words.reshape(-1)[:count].reshape(shape)


@RULES.rule("keep_mask")
def keep_mask(key: mx.array, *, shape: tuple[int, ...], p: float, site: int) -> mx.array:
    return ((words_of(key, shape, site) >> word(8)) >= word(round(p * 2**24))).astype(mx.float32)


@RULES.rule("uniform")
def uniform(key: mx.array, *, shape: tuple[int, ...], bound: float, site: int) -> mx.array:
    doubled = (words_of(key, shape, site) >> word(8)).astype(mx.int32) * 2
    return (doubled + (1 - 2**24)).astype(mx.float32) * 2.0**-24 * bound


@RULES.rule("dropout")
def dropout(x: mx.array, key: mx.array, *, p: float, site: int) -> mx.array:
    kept = keep_mask(key, shape=tuple(x.shape), p=p, site=site)
    return (x.astype(mx.float32) * kept * (1.0 / (1.0 - p))).astype(x.dtype)
