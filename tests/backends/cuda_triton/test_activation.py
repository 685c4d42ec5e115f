"""Activations and their gradients on Triton against float64 torch and torch.autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers.activations import ACT2FN

from smedjan.backends.cuda_triton import activation
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.ops import activation as act
from tests.backends.cpu_native.fused_cases import Case
from tests.backends.cuda_triton.edited import edited
from tests.backends.cuda_triton.shapes import DTYPES, LAYOUTS, into, laid_out, numbered, result_of, shapes
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")

FROM_INPUT = {
    "silu": ({}, ACT2FN["silu"]),
    "gelu": ({"approximate": "none"}, ACT2FN["gelu"]),
    "gelu tanh": ({"approximate": "tanh"}, ACT2FN["gelu_pytorch_tanh"]),
    "gelu_new": ({}, ACT2FN["gelu_new"]),
    "relu2": ({}, ACT2FN["relu2"]),
}
FROM_RESULT = {"tanh": torch.tanh, "relu": torch.relu}


@pytest.mark.parametrize(("number", "shape"), **numbered(shapes(11)))
def test_values_and_slopes(rand, number, shape):
    dtype, there = DTYPES[number % 3], LAYOUTS[number // 3 % 4]
    x = laid_out(rand(*shape, dtype=dtype, scale=3.0), LAYOUTS[number % 4])
    dy = laid_out(rand(*shape, dtype=dtype), LAYOUTS[number // 4 % 4])
    for name, (attrs, plain) in FROM_INPUT.items():
        op = name.split()[0]
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        ours, true = plain(leaf), plain(wide)
        y, dx = (result_of(*call, how=there, **attrs) for call in ((op, x), (f"{op}_bwd", dy, x)))
        assert_close(name, y, true.detach(), ours.detach())
        (true_dx,), (our_dx,) = torch.autograd.grad(true, wide, dy.double()), torch.autograd.grad(ours, leaf, dy)
        assert_close(f"{name}'s gradient", dx, true_dx, our_dx)
    for name, plain in FROM_RESULT.items():
        y = plain(x)
        assert_close(name, result_of(name, x, how=there), plain(x.double()), y)
        slope = (lambda y: 1 - y * y) if name == "tanh" else (lambda y: (y > 0).to(y.dtype))
        dx = result_of(f"{name}_bwd", dy, y, how=there)
        assert_close(f"{name}'s gradient", dx, dy.double() * slope(y.double()), dy * slope(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op", [act.silu, act.gelu, partial(act.gelu, approximate="tanh"), act.gelu_new, act.relu2, act.tanh, act.relu]
)
def test_gradients_in_a_graph(rand, op, dtype):
    name = op.func.name if isinstance(op, partial) else op.name
    Case(op, {"x": rand(5, 33, scale=3.0)}, ("x",)).check(RULES, f"{name}_bwd", dtype)


@pytest.mark.parametrize("name", ["gelu_new", "relu2"])
def test_one_launch_forward_and_one_backward(rand, name):
    x, dy = rand(3, 96), rand(3, 96)
    assert into(name, (torch.empty_like(x),), x) == ["act_fwd"]
    assert into(f"{name}_bwd", (torch.empty_like(x),), dy, x) == ["act_bwd"]


def test_a_gradient_may_take_the_place_of_either(rand, same):
    x, dy = rand(3, 130), rand(3, 130)
    expected = apply("gelu_new_bwd", dy, x)
    for place in (0, 1):
        operands = (dy.clone(), x.clone())
        into("gelu_new_bwd", (operands[place],), *operands)
        same(operands[place], expected)


@pytest.mark.parametrize("name", [*FROM_RESULT, "relu2", "silu", "gelu_new"])
def test_large_values_saturate_and_a_nan_stays(name, device):
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4, float("nan")], device=device)
    attrs = {"equal_nan": True, "rtol": 1e-6, "atol": 0.0}
    torch.testing.assert_close(apply(name, x), ACT2FN[name](x), **attrs)


@pytest.mark.parametrize("name", sorted(act.ACTIVATIONS))
def test_every_activation_of_a_config_has_a_curve(name):
    assert name in activation.CURVES


MUTATIONS = {
    "relu2 is not squared": ("        return tl.maximum(x, 0.0)", "        return tl.where(x > 0.0, 1.0, 0.0)"),
    "a slope without its bell": ("x * bell * (2.0 * ROOT_2_PI)", "x * bell * (1.0 * ROOT_2_PI)"),
    "a gradient of dy alone": ("out = grad * slope_of(value, share_of(value, ACT), ACT)", "out = grad"),
    "the last column is dropped": ("value * share_of(value, ACT)\n    tl", "tl.where(inside, value, 0.0)\n    tl"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_breaks_the_bound(rand, monkeypatch, tmp_path, name):
    x = rand(5, 33, scale=3.0)

    def check() -> None:
        for op in (act.gelu_new, act.relu2):
            Case(op, {"x": x}, ("x",)).check(RULES, op.name, torch.float32)

    check()
    monkeypatch.setattr(activation, "kernels", edited(activation.kernels, *MUTATIONS[name], tmp_path))
    with pytest.raises(AssertionError, match="> bound"):
        check()
