"""Philox4x32-10 in 64-bit integer arithmetic."""

from __future__ import annotations

import math

import torch

from smedjan.backends.torch_reference.table import RULES

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def _mulhilo(constant: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and low words of a 32 x 32 bit product; split in 16 bits, since int64 would overflow its sign."""
    low_part = (x & 0xFFFF) * constant
    high_part = (x >> 16) * constant + (low_part >> 16)
    return (high_part >> 16) & MASK, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox(counter: tuple[torch.Tensor, int, int, int], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words (in int64) for each counter (Salmon et al. 2011, section 3.2)."""
    shape = counter[0]
    c0, c1, c2, c3 = (shape, *(torch.full_like(shape, word) for word in counter[1:]))
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(MULTIPLIERS[0], c0)
        hi1, lo1 = _mulhilo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def words_of(key: torch.Tensor, shape: tuple[int, ...], site: int) -> torch.Tensor:
    """The word of each element of `shape`, int64."""
    seed_low, seed_high, step, micro = key.tolist()
    count = math.prod(shape)
    index = torch.arange((count + 3) // 4, dtype=torch.int64, device=key.device)
    words = torch.stack(philox((index, site, step, micro), (seed_low, seed_high)), dim=-1)
    return words.reshape(-1)[:count].reshape(shape)


@RULES.rule("keep_mask")
def keep_mask(key, *, shape, p, site):
    return ((words_of(key, shape, site) >> 8) >= round(p * 2**24)).to(torch.float32)


@RULES.rule("uniform")
def uniform(key, *, shape, bound, site):
    odd = ((words_of(key, shape, site) >> 8) << 1) + (1 - 2**24)
    return odd.to(torch.float32) * 2.0**-24 * bound
