"""The kernels of norms from their own source: against float64 and their twins, and the limits of M1 to M4."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
import torch
from metal_checks import BFLOAT16, DTYPES, FLOAT32, held, normal, without_barrier
from metal_emulator import Emulator, MetalError, Recorder, check_limits, source_of
from mlx_pair import MLX, from_torch, to_torch

from smedjan.backends.mlx_metal import norm
from smedjan.backends.mlx_metal.kernels import common
from smedjan.backends.mlx_metal.kernels import norm as norm_kernels
from smedjan.graph.node import Graph
from smedjan.ops.norm import add_rms_norm

NORMS = {
    "rms before": {"layer": False, "offset": 0.0, "cast_before": True},
    "rms after": {"layer": False, "offset": 1.0, "cast_before": False},
    "layer": {"layer": True, "offset": 0.0, "cast_before": False},
}


def norm_of(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, layer: bool, offset: float
) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True) if layer else x
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * (offset + weight)
    return y if bias is None else y + bias


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(1, 1, FLOAT32), *((5, 129, dtype) for dtype in DTYPES), (2, 5003, FLOAT32), (2, 5003, BFLOAT16)],
)
def test_add_norm(rows, width, dtype, kind, metal):
    """Rows of less than a simdgroup, of one run a thread and of several, of no multiple of anything."""
    attrs = NORMS[kind]
    layer, offset, before = attrs["layer"], attrs["offset"], attrs["cast_before"]
    x, delta = (normal(rows, width, dtype=dtype, seed=seed) for seed in (1, 2))
    weight, bias = (1 + normal(width, dtype=dtype, seed=seed, scale=0.2) for seed in (3, 4))
    arrays = [from_torch(MLX, each) for each in (x, delta, weight)]
    given_bias = from_torch(MLX, bias) if layer else None
    made = norm_kernels.norm(*arrays, given_bias, layer=layer, eps=1e-5, offset=offset, factor=0.3, cast_before=before)
    if layer:
        twins = norm.add_layer_norm(*arrays, given_bias, eps=1e-5, composed=False, factor=0.3)
    else:
        cast = "before" if before else "after"
        twins = norm.add_rms_norm(*arrays, eps=1e-5, weight_cast=cast, offset=offset, factor=0.3)
    held("sum", made[0], twins[0], x.double() + 0.3 * delta.double())
    # The norm is of the sum as it is rounded.
    total = to_torch(MLX, made[0]).double()
    expected = norm_of(total, weight.double(), bias.double() if layer else None, layer=layer, offset=offset)
    held("y", made[1], twins[1], expected, max(1.0, float(expected.abs().max())))
    centred = total - total.mean(-1, keepdim=True) if layer else total
    held("rstd", made[-1], twins[-1], torch.rsqrt(centred.square().mean(-1) + 1e-5))
    if layer:
        held("mean", made[2], twins[2], total.mean(-1), float(total.abs().max()))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(1, 7, FLOAT32), *((300, 33, dtype) for dtype in DTYPES), (9, 5003, BFLOAT16)],
)
def test_norm_bwd(rows, width, dtype, kind, metal):
    """More rows than programs, and fewer; a cotangent that waits."""
    attrs = NORMS[kind]
    layer, offset, before = attrs["layer"], attrs["offset"], attrs["cast_before"]
    x, dy, acc = (normal(rows, width, dtype=dtype, seed=seed) for seed in (1, 2, 5))
    weight = 1 + normal(width, dtype=dtype, seed=3, scale=0.2)
    exact = [each.double().requires_grad_() for each in (x, weight, torch.zeros(width))]
    y = norm_of(exact[0], exact[1], exact[2], layer=layer, offset=offset)
    gradients = list(torch.autograd.grad((y * dy.double()).sum(), exact))
    gradients[0] = gradients[0] + acc.double()
    centred = x.double() - x.double().mean(-1, keepdim=True) if layer else x.double()
    mean = from_torch(MLX, x.double().mean(-1).float()) if layer else None
    rstd = from_torch(MLX, torch.rsqrt(centred.square().mean(-1) + 1e-5).float())
    given_x, given_w, given_dy, given_acc = (from_torch(MLX, each) for each in (x, weight, dy, acc))
    needs = (True, True, True)[: 2 + layer]
    made = norm_kernels.norm_bwd(
        given_x, given_w, mean, rstd, given_dy, given_acc, needs=needs, offset=offset, cast_before=before
    )
    if layer:
        twins = norm.layer_norm_bwd(
            given_x, given_w, given_w, mean, rstd, given_dy, given_acc, needs=needs, eps=1e-5, composed=False
        )
    else:
        cast = "before" if before else "after"
        twins = norm.rms_norm_bwd(
            given_x, given_w, rstd, given_dy, given_acc, needs=needs, eps=1e-5, weight_cast=cast, offset=offset
        )
    for name, value, twin, expected in zip(("dx", "dw", "db"), made, twins, gradients, strict=False):
        held(name, value, twin, expected)


def test_two_runs_are_equal_to_the_bit(monkeypatch):
    """Sums over rows, in two stages: whatever order the threads come in."""
    x, dy = mx.random.normal((300, 40)), mx.random.normal((300, 40))
    made = []
    for order in (0, 1):
        monkeypatch.setattr(common, "DEVICE", Emulator(order=order))
        made.append(norm_kernels.norm_bwd(x, mx.ones(40), None, mx.ones(300), dy, None, needs=(True, True)))
    for one, other in zip(*made, strict=True):
        assert mx.array_equal(one, other)


@pytest.mark.parametrize("at", [0, 1])
def test_norm_bwd_needs_its_barriers(at, metal, monkeypatch):
    """That of a row's sum; and the two sets of partial sums, which a single one would not replace."""
    whole = norm_kernels._backward(layer=False, waits=False, dx=True, dw=True, db=False)
    if at == 0:
        broken = without_barrier(whole, 0)
    else:
        source = whole.source.replace("parts + turn *", "parts + 0 *")
        assert source != whole.source
        broken = replace(whole, source=source)
    monkeypatch.setattr(norm_kernels, "_backward", lambda **_: broken)
    x = mx.random.normal((600, 300))
    with pytest.raises(MetalError, match=r"race|before it is written"):
        norm_kernels.norm_bwd(x, mx.ones(300), None, mx.ones(600), x, None, needs=(True, True))


def test_a_row_that_no_threadgroup_holds_is_left_to_the_twin(metal):
    width = norm_kernels.MAX_WIDTH
    for more, label in ((0, "metal add_rms_norm"), (1, "mlx add, rms_norm")):
        graph = Graph()
        x, delta = (graph.input(name, (2, width + more), "float32") for name in ("x", "delta"))
        weight = graph.input("w", (width + more,), "float32")
        graph.output("y", add_rms_norm(x, delta, weight, eps=1e-5)[1])
        assert [call.label for call in MLX.program(graph).calls] == [label]


WIDTHS = {
    "SmolLM2-135M": 576,
    "Qwen2.5-0.5B": 896,
    "Gemma-3-1b": 1152,
    "Llama-3.2-1B": 2048,
    "Gemma-2-2b": 2304,
    "Qwen3-4B": 2560,
    "Llama-3.2-3B": 3072,
    "Qwen2.5-7B": 3584,
    "Llama-3.1-8B": 4096,
    "Qwen2.5-14B": 5120,
    "Llama-3.1-70B": 8192,
}
"""hidden_size of models that people train on a Mac, or would."""


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("model", WIDTHS)
def test_norms_of_real_models_keep_the_limits(model, dtype, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(common, "DEVICE", recorder)
    width = WIDTHS[model]

    x, weight, rstd = mx.zeros((2, 2048, width), dtype), mx.zeros((width,), dtype), mx.zeros((2, 2048))
    for layer in (False, True):
        norm_kernels.norm(x, x, weight, weight if layer else None, layer=layer, eps=1e-5)
        for needs in ((True, True, layer), (True, False, False), (False, True, False)):
            norm_kernels.norm_bwd(x, weight, rstd if layer else None, rstd, x, x, needs=needs)
    assert len(recorder.launched) == 8
    for kernel, launch in recorder.launched:
        check_limits(source_of(kernel, launch), launch)
        # n, g, dw and db of a row in registers, and 32 words beside them: so many threads share a core's 208 KB.
        held_values = dict(launch.template)["RUNS"] * common.RUN
        assert launch.threads * 4 * (4 * held_values + 32) <= 208 << 10
