"""The global norm, the clip and gradient accumulation on Triton against float64."""

from __future__ import annotations

import random

import pytest
import torch

from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import common
from tests.tolerances import assert_close


def mixes() -> list[tuple[list[int], torch.dtype]]:
    chance = random.Random(11)
    sizes = [[1], [7, 33], [3, 0, 8192, 8193, 40000], [100000], [0]]
    sizes += [[chance.randrange(1, 9000) for _ in range(chance.randrange(1, 7))] for _ in range(16)]
    return [(mix, dtype) for mix in sizes for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("sizes", "dtype"), mixes(), ids=str)
def test_norm_and_clip_are_within_the_derived_bound(rand, sizes, dtype):
    grads = [rand(size, dtype=dtype, scale=float(index + 1)) for index, size in enumerate(sizes)]
    limit = 20.0
    norm, coefficient = apply("norm_and_clip", *grads, max_norm=limit)
    assert norm.shape == coefficient.shape == ()
    assert norm.dtype == coefficient.dtype == torch.float32
    exact, torchs = (torch.cat([grad.to(kind) for grad in grads]).norm() for kind in (torch.float64, torch.float32))
    assert_close("norm", norm, exact, torchs)
    exact, torchs = ((limit / (value + 1e-6)).clamp(max=1.0) for value in (exact, torchs))
    assert_close("coefficient", coefficient, exact, torchs)
    alone = apply("global_norm", *grads)
    assert alone.dtype == dtype
    assert torch.equal(alone, norm.to(dtype))
    assert torch.equal(apply("clip_coefficient", norm, max_norm=limit), coefficient)


def test_gradients_of_several_dtypes_have_one_norm(rand):
    grads = [rand(100), rand(9000, dtype=torch.bfloat16), rand(7, dtype=torch.float16), rand(33)]
    norm, _ = apply("norm_and_clip", *grads, max_norm=1.0)
    assert_close("norm", norm, *(torch.cat([g.to(d) for g in grads]).norm() for d in (torch.float64, torch.float32)))


def test_a_norm_takes_any_shape_and_counts_every_program_once(rand, monkeypatch):
    monkeypatch.setattr(common, "NORM_PROGRAMS", 2)
    grad = rand(7, 5000)
    assert common.square_sum_programs(grad.numel()) == 2
    torch.testing.assert_close(apply("global_norm", grad).double(), grad.double().norm(), rtol=2.0**-20, atol=0)


def test_more_partial_sums_than_are_added_at_once(rand, monkeypatch):
    monkeypatch.setattr(common, "square_sum_tile", lambda: common.Tile(rows=1, cols=64, num_warps=1))
    grad = rand(20000)
    assert common.square_sum_programs(grad.numel()) == 157
    torch.testing.assert_close(apply("global_norm", grad).double(), grad.double().norm(), rtol=2.0**-20, atol=0)


def test_the_norm_of_nothing_is_zero_and_of_nan_is_nan(rand):
    assert [float(value) for value in apply("norm_and_clip", rand(0), max_norm=1.0)] == [0.0, 1.0]
    bad = rand(9)
    bad[3] = float("nan")
    assert all(bool(value.isnan()) for value in apply("norm_and_clip", rand(9), bad, max_norm=1.0))
    bad[3] = float("inf")
    assert [float(value) for value in apply("norm_and_clip", bad, max_norm=1.0)] == [float("inf"), 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (33, 7), (0,), (1025,)], ids=str)
def test_accumulate_rounds_once(rand, shape, dtype):
    total, grad = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)
    expected = (total.float() + grad.float()).to(dtype)
    assert apply("accumulate", total, grad) is total
    assert torch.equal(total, expected)
