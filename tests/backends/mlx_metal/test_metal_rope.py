"""The kernels of rotations from their own source: against float64 and their twins, and the limits of M1 to M4."""

from __future__ import annotations

import mlx.core as mx
import pytest
import torch
from metal_checks import BFLOAT16, DTYPES, FLOAT32, held, normal
from metal_emulator import Recorder, check_limits, source_of
from mlx_pair import MLX, from_torch

from smedjan.backends.mlx_metal import rope
from smedjan.backends.mlx_metal.kernels import common
from smedjan.backends.mlx_metal.kernels import rope as rope_kernels


def rotated(v: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The first 2 n dims of v [B, H, T, D] turned by angles [B or 1, 1, T, n]."""
    turns, cos, sin = 2 * angles.shape[-1], angles.cos(), angles.sin()
    one, two = (v[..., :turns:2], v[..., 1:turns:2]) if interleaved else v[..., :turns].chunk(2, dim=-1)
    pairs = one * cos - two * sin, two * cos + one * sin
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([turned, v[..., turns:]], dim=-1)


@pytest.mark.parametrize(
    ("dim", "turns", "interleaved", "normed", "tables_of", "dtype"),
    [
        *((128, 128, False, True, 1, dtype) for dtype in DTYPES),
        (10, 6, False, True, 2, FLOAT32),
        (80, 80, True, True, 2, BFLOAT16),
        (96, 32, False, False, 1, FLOAT32),
    ],
)
def test_qk_norm_rope(dim, turns, interleaved, normed, tables_of, dtype, metal):
    """Forward and backward; tables of all sequences, or of each; heads lie in memory in drawn orders."""
    q, k, dq, dk = (normal(2, heads, 9, dim, dtype=dtype, seed=heads + extra) for extra in (0, 9) for heads in (3, 1))
    weights = [1 + normal(dim, dtype=dtype, seed=seed, scale=0.2) for seed in (3, 4)] if normed else [None, None]
    positions = torch.arange(9) + 5 * torch.arange(tables_of)[:, None]
    freqs = positions[:, None, :, None] * torch.logspace(0, -2, turns // 2).double()
    angles = freqs.repeat_interleave(2, -1) if interleaved else torch.cat([freqs, freqs], -1)
    # The tables are the kernel's input: exact, so that the reference may use the angles.
    tables = [from_torch(MLX, each.float()) for each in (angles.cos(), angles.sin())]
    exact = [each.double().requires_grad_() for each in (q, k, *weights) if each is not None]

    def expected_of(x, weight):
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1.0 + weight)
        return rotated(x, freqs, interleaved)

    outs = [expected_of(exact[i], exact[2 + i] if normed else None) for i in (0, 1)]
    seeds = [each.double() for each in (dq, dk)]
    gradients = torch.autograd.grad(sum((y * dy).sum() for y, dy in zip(outs, seeds, strict=True)), exact)
    arrays = [from_torch(MLX, each) for each in (q, k)]
    held_weights = [None if each is None else from_torch(MLX, each) for each in weights]
    cotangents = [from_torch(MLX, each) for each in (dq, dk)]
    attrs = {"eps": 1e-5, "weight_cast": "after", "offset": 1.0, "interleaved": interleaved, "upcast": "terms"}
    made, twins = (of(*arrays, *held_weights, *tables, **attrs) for of in (rope.metal_qk_norm_rope, rope.qk_norm_rope))
    for name, value, twin, expected in zip(("q", "k"), made, twins, outs, strict=True):
        held(name, value, twin, expected.detach())
    needs = (True, True, normed, normed)
    raw = arrays if normed else [None, None]
    made, twins = (
        of(*cotangents, *raw, *held_weights, *tables, needs=needs, **attrs)
        for of in (rope.metal_qk_norm_rope_bwd, rope.qk_norm_rope_bwd)
    )
    for name, value, twin, expected in zip(
        ("dq", "dk", "dq_weight", "dk_weight"), made, twins, gradients, strict=False
    ):
        held(name, value, twin, expected)


def test_norm_rope_bwd_by_few_programs(metal, monkeypatch):
    """Each simdgroup walks over many heads: its sums of the weight's gradient are the same but for their order."""
    x, dy = mx.random.normal((1, 4, 40, 16)), mx.random.normal((1, 4, 40, 16))
    tables = mx.ones((1, 1, 40, 16)), mx.zeros((1, 1, 40, 16))
    attrs = {"needs": (True, True), "interleaved": False, "eps": 1e-5, "offset": 0.0}
    whole = rope_kernels.norm_rope_bwd(x, dy, mx.ones(16), *tables, **attrs)
    monkeypatch.setattr(rope_kernels, "PROGRAMS", 8)
    few = rope_kernels.norm_rope_bwd(x, dy, mx.ones(16), *tables, **attrs)
    assert [launch.groups[0] for _, launch in metal.launched] == [20, 1]
    assert mx.array_equal(whole[0], few[0])
    # Two orders of a sum of 160 terms of which none is above 16: |g| < 4 and |n| <= 4.
    assert mx.abs(whole[1] - few[1]).max().item() <= 2 * 160 * 2.0**-24 * 16 * 160**0.5


HEAD_DIMS = {
    "SmolLM2-135M": (9, 3, 64, 64, False),
    "Qwen2.5-7B": (28, 4, 128, 128, False),
    "Qwen3-4B": (32, 8, 128, 128, True),
    "Gemma-2-2b": (8, 4, 256, 256, False),
    "Gemma-3-4b": (8, 4, 256, 256, True),
    "Phi-3-mini": (32, 32, 96, 96, False),
    "Phi-4-mini": (24, 8, 128, 96, False),
}
"""Heads of queries and of keys, head_dim, how much of it turns, and whether heads have norms."""


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("model", HEAD_DIMS)
def test_heads_of_attention_of_real_models_keep_the_limits(model, dtype, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(common, "DEVICE", recorder)
    q_heads, k_heads, dim, turns, normed = HEAD_DIMS[model]
    attrs = {"eps": 1e-6, "weight_cast": "before", "offset": 0.0, "interleaved": False, "upcast": ""}

    q, k = (mx.zeros((4, 2048, heads, dim), dtype).swapaxes(1, 2) for heads in (q_heads, k_heads))
    tables = [mx.zeros((1, 1, 2048, turns), dtype)] * 2
    weights = [mx.zeros((dim,), dtype) if normed else None] * 2
    raw, needs = ((q, k) if normed else (None, None)), (True, True, normed, normed)
    rope.metal_qk_norm_rope(q, k, *weights, *tables, **attrs)
    rope.metal_qk_norm_rope_bwd(q, k, *raw, *weights, *tables, needs=needs, **attrs)
    assert len(recorder.launched) == (3 if normed else 2)
    for kernel, launch in recorder.launched:
        check_limits(source_of(kernel, launch), launch)
