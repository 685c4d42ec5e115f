"""Metal kernels from their own source: the numbers against float64 and their twins, and the limits of M1 to M4.

`metal_emulator.py` says how they run here. Every case of `mlx_cases.py` whose op a kernel lowers runs as a program of
this backend, gradients included, with the kernels as its rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import pytest
import torch
from metal_emulator import Emulator, MetalError, Recorder, check_limits, source_of
from mlx_cases import CASES
from mlx_pair import MLX, TORCH, Case, check, from_torch, to_torch

from smedjan.backends.mlx_metal import loss, norm, quantized, rope
from smedjan.backends.mlx_metal.elementwise import DTYPES as DTYPE_OF
from smedjan.backends.mlx_metal.kernels import common
from smedjan.backends.mlx_metal.kernels import loss as loss_kernels
from smedjan.backends.mlx_metal.kernels import norm as norm_kernels
from smedjan.backends.mlx_metal.kernels import quantized as quantized_kernels
from smedjan.backends.mlx_metal.kernels import rope as rope_kernels
from smedjan.backends.mlx_metal.kernels.common import Kernel
from smedjan.checkpoint import nf4
from smedjan.graph.lowering import Rule
from smedjan.graph.node import Graph
from smedjan.ops.norm import add_rms_norm
from smedjan.ops.quantized import nf4_linear, nf4_specs
from tests.tolerances import UNIT_ROUNDOFF, error

INEXACT = 2.0**-20
"""Relative error of what a kernel chains: exp or tanh, and log, of 4 or 5 ulp at most (metal_shim.h), 2^-23 an ulp."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def metal(monkeypatch) -> Iterator[Emulator]:
    emulator = Emulator()
    monkeypatch.setattr(common, "DEVICE", emulator)
    return emulator


def held(
    name: str,
    value: mx.array,
    twin: mx.array,
    reference: torch.Tensor,
    scale: float | None = None,
    inexact: float = INEXACT,
) -> None:
    """|value - reference| <= 2 |twin - reference| + (2 u + a) scale: tests/tolerances.py, a for Metal's functions."""
    found, plain = to_torch(MLX, value), to_torch(MLX, twin)
    assert found.dtype == plain.dtype, name
    scale = float(reference.abs().max()) if scale is None else scale
    most = 2 * error(plain, reference) + (2 * UNIT_ROUNDOFF[found.dtype] + inexact) * scale
    assert error(found, reference) <= most, f"{name}: {error(found, reference)} > {most}"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def kernel_ops() -> set[str]:
    """Ops with a rule that is for Metal alone: each has another, its twin."""
    return {name for name, rules in MLX.rules._rules.items() if any(_is_kernel(rule) for rule in rules)}


def _is_kernel(rule: Rule) -> bool:
    return "metal " in rule.label


def test_each_kernel_has_a_twin_and_the_plan_says_which_one_runs(metal, monkeypatch):
    for name in kernel_ops():
        rules = MLX.rules._rules[name]
        assert any(not _is_kernel(rule) for rule in rules), f"{name} has no twin"
    case = CASES["linear_cross_entropy"]
    assert labels(case)["linear_cross_entropy"] == "mlx, chunked rows, metal cross_entropy"
    monkeypatch.undo()
    assert labels(case)["linear_cross_entropy"] == "mlx, chunked rows"


def labels(case: Case) -> dict[str, str]:
    return {call.node.op.name: call.label for call in case.program(MLX, "float32").calls}


def emulated() -> list[str]:
    """Cases whose program has a kernel."""
    ops = kernel_ops()
    return [
        name for name, case in CASES.items() if any(c.node.op.name in ops for c in case.program(MLX, "float32").calls)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", emulated())
def test_rule(name, dtype, metal):
    check(CASES[name], dtype)
    assert metal.launched, "no kernel ran"


def test_every_kernel_op_is_in_a_case():
    run = {call.node.op.name for name in emulated() for call in CASES[name].program(MLX, "float32").calls}
    assert kernel_ops() <= run


SHAPINGS = {
    "plain": {"factor": 1.0, "cap": 0.0, "z_loss": 0.0, "smoothing": 0.0},
    "all": {"factor": 0.7, "cap": 3.0, "z_loss": 0.01, "smoothing": 0.1},
}


def cross_entropy_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    items: float,
    *,
    factor: float,
    cap: float,
    z_loss: float,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of their sum / items, in float64 by autograd."""
    logits = logits.double().requires_grad_()
    z = logits * factor
    z = cap * torch.tanh(z / cap) if cap else z
    lse = torch.logsumexp(z, dim=-1)
    target = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    losses = lse - (1 - smoothing) * target - smoothing * z.mean(dim=-1) + z_loss * lse**2
    losses = torch.where(labels != -100, losses, 0.0)
    (gradient,) = torch.autograd.grad(losses.sum() / items, logits)
    return losses.detach(), gradient


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 7), (7, 33), (5, 130), (1, 1000), (3, 3001)])
def test_cross_entropy(rows, vocab, dtype, shaping, metal):
    """Vocabularies of no multiple, less than a simdgroup and more than a threadgroup's first step; rows left out."""
    logits = normal(rows, vocab, dtype=dtype, scale=4.0, seed=vocab)
    labels = torch.arange(rows) * 5 % vocab
    labels[1::2] = -100
    items, attrs = 2.5, SHAPINGS[shaping]
    given = [from_torch(MLX, each) for each in (logits, labels.int(), torch.tensor(items))]
    losses, dlogits = loss_kernels.cross_entropy(*given, gradient=True, **attrs)
    alone, none = loss_kernels.cross_entropy(*given, gradient=False, **attrs)
    twin_losses, twin_dlogits = loss._losses(*given, gradient=True, **attrs)
    expected, gradient = cross_entropy_of(logits, labels, items, **attrs)
    # lse less z[label], and p less one: where they cancel, the error is that of what cancels.
    held("losses", losses, twin_losses, expected, float(logits.abs().max()) + float(expected.max()))
    held("dlogits", dlogits, twin_dlogits, gradient, attrs["factor"] / items)
    assert none is None
    assert mx.array_equal(alone, losses)
    assert not dlogits[1::2].any()


def test_a_row_of_far_logits_is_summed_without_overflow(metal):
    """Peaks beyond float32's exponent, of either sign, in one row and in one thread's run."""
    logits = torch.full((3, 70), -3e4)
    logits[0, 1::3], logits[1, 69], logits[2] = 3e4, 2e4, -2e4
    given = [from_torch(MLX, each) for each in (logits, torch.tensor([0, 69, 3]).int(), torch.tensor(1.0))]
    losses, dlogits = loss_kernels.cross_entropy(*given, gradient=True, **SHAPINGS["plain"])
    expected, gradient = cross_entropy_of(logits, torch.tensor([0, 69, 3]), 1.0, **SHAPINGS["plain"])
    held("losses", losses, losses, expected, 6e4)
    held("dlogits", dlogits, dlogits, gradient)


def test_a_label_outside_the_vocabulary_makes_its_loss_nan_and_reads_nothing(metal):
    logits, labels = mx.zeros((3, 40)), mx.array([40, -1, 39], dtype=mx.int32)
    losses, _ = loss_kernels.cross_entropy(logits, labels, mx.array(1.0), gradient=True, **SHAPINGS["plain"])
    assert mx.isnan(losses).tolist() == [True, True, False]


def test_two_runs_are_equal_to_the_bit(monkeypatch):
    """Whatever order the threads come in. The functions' errors follow the arguments here, and are drawn once."""
    made = []
    logits, labels = mx.random.normal((4, 600)), mx.array([1, 2, -100, 599], dtype=mx.int32)
    for order in (0, 1):
        emulator = Emulator(seed=7, order=order)
        monkeypatch.setattr(common, "DEVICE", emulator)
        made += loss_kernels.cross_entropy(logits, labels, mx.array(3.0), gradient=True, **SHAPINGS["all"])
    assert mx.array_equal(made[0], made[2])
    assert mx.array_equal(made[1], made[3])


BARRIER = "  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\n"


def without_barrier(kernel: Kernel, at: int) -> Kernel:
    """The kernel, its header before it, less one of its barriers."""
    parts = (kernel.header + "//body\n" + kernel.source).split(BARRIER)
    text = BARRIER.join(parts[: at + 1]) + BARRIER.join(["", *parts[at + 1 :]])[len(BARRIER) :]
    header, source = text.split("//body\n")
    return replace(kernel, source=source, header=header)


def test_cross_entropy_needs_its_barrier(metal, monkeypatch):
    monkeypatch.setattr(loss_kernels, "LOSS", without_barrier(loss_kernels.LOSS, 1))
    logits, labels = mx.zeros((3, 400)), mx.zeros(3, dtype=mx.int32)
    with pytest.raises(MetalError, match=r"race|before it is written"):
        loss_kernels.cross_entropy(logits, labels, mx.array(1.0), gradient=False, **SHAPINGS["plain"])


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 129), (2, 5003)])
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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 7), (300, 33), (3, 5003)])
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


def rotated(v: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The first 2 n dims of v [B, H, T, D] turned by angles [B or 1, 1, T, n]."""
    turns, cos, sin = 2 * angles.shape[-1], angles.cos(), angles.sin()
    one, two = (v[..., :turns:2], v[..., 1:turns:2]) if interleaved else v[..., :turns].chunk(2, dim=-1)
    pairs = one * cos - two * sin, two * cos + one * sin
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([turned, v[..., turns:]], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "turns", "interleaved", "normed", "tables_of"),
    [(128, 128, False, True, 1), (10, 6, False, True, 2), (80, 80, True, True, 2), (96, 32, False, False, 1)],
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


def nf4_of(weight: torch.Tensor) -> tuple[list[mx.array], dict]:
    raw = nf4.quantize(TORCH.to_raw(weight))
    return [MLX.from_raw(part) for part in raw.values()], raw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (5, 64), (131, 128), (3, 5462)])
def test_nf4_dequantize_gives_the_formats_bits(shape, dtype, metal):
    """Half a byte, a short last block, more than one nested block and more than one threadgroup."""
    parts, raw = nf4_of(normal(*shape, seed=shape[1]))
    made = quantized.metal_nf4_dequantize(*parts, shape=shape, dtype=dtype)
    assert MLX.to_raw(made).data.tobytes() == nf4.dequantize(raw, shape, dtype).data.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outs", "width"), [(1, 13, 64), (3, 7, 320), (8, 17, 1088)])
def test_nf4_linear(rows, outs, width, dtype, metal):
    """Rows of x in one pass and in two, rows of w of no multiple, steps that end within a simdgroup."""
    parts, raw = nf4_of(normal(outs, width, seed=width))
    x, bias = normal(rows, width, dtype=dtype), normal(outs, dtype=dtype, seed=1)
    weight = TORCH.from_raw(nf4.dequantize(raw, (outs, width), "float32")).double()
    given, added = from_torch(MLX, x), from_torch(MLX, bias)
    for each, expected in ((added, x.double() @ weight.T + bias.double()), (None, x.double() @ weight.T)):
        made = quantized.metal_nf4_linear(given, *parts, each, shape=(outs, width))
        held("y", made, quantized.nf4_linear(given, *parts, each, shape=(outs, width)), expected, inexact=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outs", "width"), [(1, 13, 7), (2, 1, 257), (8, 17, 1003)])
def test_int8_linear(rows, outs, width, dtype, metal):
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(-127, 128, (outs, width), generator=generator).to(torch.int8)
    x, scales, bias = normal(rows, width, dtype=dtype), normal(outs).abs(), normal(outs, dtype=dtype, seed=1)
    given = [from_torch(MLX, each) for each in (x, codes, scales, bias)]
    expected = x.double() @ (codes.double() * scales.double()[:, None]).T + bias.double()
    held("y", quantized.metal_int8_linear(*given), quantized.int8_linear(*given), expected, inexact=0.0)


def test_many_rows_widen_the_weight_once(metal):
    """Past MAX_ROWS, and where a block of w lies in two of its rows, the product is MLX's."""
    for rows, width, label in (
        (quantized_kernels.MAX_ROWS, 128, "metal nf4_linear"),
        (quantized_kernels.MAX_ROWS + 1, 128, "metal nf4_dequantize, mlx"),
        (1, 96, "metal nf4_dequantize, mlx"),
    ):
        graph, shape = Graph(), (5, width)
        parts = [graph.input(name, spec.shape, spec.dtype) for name, spec in nf4_specs(shape).items()]
        graph.output("y", nf4_linear(graph.input("x", (rows, width), "bfloat16"), *parts, shape=shape))
        assert [call.label for call in MLX.program(graph).calls] == [label]


HEADS = {
    "SmolLM2-135M": (576, 49152, 0.0),
    "Qwen2.5-0.5B": (896, 151936, 0.0),
    "Qwen3-4B": (2560, 151936, 0.0),
    "Llama-3.1-8B": (4096, 128256, 0.0),
    "Mistral-7B-v0.3": (4096, 32768, 0.0),
    "Gemma-2-2b": (2304, 256000, 30.0),
    "Gemma-3-4b": (2560, 262144, 0.0),
}
"""hidden_size, vocab_size and final_logit_softcapping of models that people train on a Mac."""


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("model", HEADS)
def test_heads_of_real_models_keep_the_limits(model, dtype, monkeypatch):
    """As the rule launches them, at their sizes."""
    recorder = Recorder()
    monkeypatch.setattr(common, "DEVICE", recorder)
    width, vocab, cap = HEADS[model]
    x, weight, labels = mx.zeros((2, 1024, width), dtype), mx.zeros((vocab, width), dtype), mx.zeros((2048,), mx.int64)
    for grads in ("xw", ""):
        loss.metal_linear_cross_entropy(
            *(x, weight, labels, mx.array(1.0)),
            **{"grads": grads, "scaling": 1.0, "divisor": 1.0, "cap": cap, "z_loss": 0.0, "smoothing": 0.0},
        )
    assert {kernel.name for kernel, _ in recorder.launched} == {
        loss_kernels.LOSS.name,
        loss_kernels.LOSS_AND_GRADIENT.name,
    }
    for kernel, launch in recorder.launched:
        check_limits(source_of(kernel, launch), launch)
        assert launch.threads == 512


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


LINEARS = {
    "SmolLM2-135M": (576, 1536),
    "Qwen2.5-7B": (3584, 18944),
    "Llama-3.1-8B": (4096, 14336),
    "Mistral-7B-v0.3": (4096, 14336),
    "Gemma-2-2b": (2304, 9216),
    "Llama-3.1-70B": (8192, 28672),
}
"""hidden_size and intermediate_size."""


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("model", LINEARS)
def test_products_of_real_models_keep_the_limits(model, dtype, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(common, "DEVICE", recorder)
    for shape in (LINEARS[model], LINEARS[model][::-1]):
        specs = nf4_specs(shape).values()
        parts = [mx.zeros(spec.shape, DTYPE_OF[spec.dtype]) for spec in specs]
        for rows in (1, quantized_kernels.MAX_ROWS):
            x = mx.zeros((rows, shape[1]), dtype)
            quantized.metal_nf4_linear(x, *parts, None, shape=shape)
            quantized.metal_int8_linear(x, mx.zeros(shape, mx.int8), mx.zeros(shape[:1]), None)
        quantized.metal_nf4_linear_of_many(mx.zeros((512, shape[1]), dtype), *parts, None, shape=shape)
    assert len(recorder.launched) == 10
    for kernel, launch in recorder.launched:
        check_limits(source_of(kernel, launch), launch)
