"""kv_write on Triton: every value at its place, all others as they were."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.cuda_triton.apply import apply

GENERATOR = torch.Generator().manual_seed(5)
SHAPES = [
    tuple(int(torch.randint(1, most, (), generator=GENERATOR)) for most in (4, 6, 40, 140)) for _ in range(36)
] + [(1, 1, 1, 1), (2, 3, 1, 64), (1, 2, 33, 80), (1, 1, 70, 256)]
"""batch, heads, tokens, head_dim"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_new_tokens_and_nothing_else(rand, device, shape, dtype):
    batch, heads, tokens, dim = shape
    start = (7 * tokens + dim) % 11
    cache = rand(batch, heads, start + tokens + 3, dim, dtype=dtype)
    kv = rand(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    expected = cache.clone()
    expected[:, :, start : start + tokens] = kv
    made = apply("kv_write", cache, kv, start)
    assert made.data_ptr() == cache.data_ptr()
    assert torch.equal(cache, expected)


def test_what_does_not_fit_is_not_written(rand):
    wide = rand(1, 2, 8, 16)
    cache, before = wide[:, :, :4], wide.clone()
    kv = rand(1, 2, 3, 16)
    apply("kv_write", cache, kv, 2)
    before[:, :, 2:4] = kv[:, :, :2]
    assert torch.equal(wide, before)
