"""glu and its gradients on Triton against float64 torch and torch.autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.glu import CURVES
from smedjan.ops.activation import ACTIVATIONS
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 7), (5, 33), (3, 96), (2, 3, 576), (2, 1536), (1, 4097)]


def glu(gate: Tensor, up: Tensor, *, act: str = "silu") -> Tensor:
    return apply("glu", gate, up, act=act)


def glu_bwd(
    gate: Tensor, up: Tensor, dy: Tensor, *, needs: tuple[bool, bool], act: str = "silu"
) -> tuple[Tensor | None, Tensor | None]:
    made = apply("glu_bwd", gate, up, dy, needs=needs, act=act)
    found = iter(made if isinstance(made, tuple) else (made,))
    return tuple(next(found) if need else None for need in needs)


def plain(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """transformers' own activation, which is torch's formula in gate's dtype."""
    return ACT2FN[act](gate) * up


def gradients(gate: Tensor, up: Tensor, dy: Tensor, act: str = "silu") -> tuple[Tensor, ...]:
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    return torch.autograd.grad(plain(*leaves, act), leaves, dy)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", sorted(CURVES.keys() - {"silu"}))
def test_every_activation_is_within_the_derived_bound(rand, act, dtype):
    gate, up, dy = (rand(3, 333, dtype=dtype, scale=scale) for scale in (4.0, 1.0, 1.0))
    assert_close("y", glu(gate, up, act=act), plain(gate.double(), up.double(), act), plain(gate, up, act))
    got = glu_bwd(gate, up, dy, needs=(True, True), act=act)
    reference = gradients(gate.double(), up.double(), dy.double(), act)
    for name, value, true, ours in zip(("dgate", "dup"), got, reference, gradients(gate, up, dy, act), strict=True):
        assert_close(name, value, true, ours)


def test_there_is_a_curve_for_every_activation():
    assert set(CURVES) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_are_within_the_derived_bound(rand, shape, dtype):
    gate, up, dy = rand(*shape, dtype=dtype, scale=3.0), rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)
    y = glu(gate, up)
    assert y.dtype == dtype
    assert_close("y", y, plain(gate.double(), up.double()), plain(gate, up))
    got = glu_bwd(gate, up, dy, needs=(True, True))
    reference = gradients(gate.double(), up.double(), dy.double())
    for name, value, true, ours in zip(("dgate", "dup"), got, reference, gradients(gate, up, dy), strict=True):
        assert_close(name, value, true, ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_is_rounded_before_it_meets_up(rand, dtype):
    """As in transformers' `act_fn(gate) * up`: in the interpreter to the bit, on a device but for exp's last bits."""
    gate, up = rand(8, 576, dtype=dtype), rand(8, 576, dtype=dtype)
    differs = glu(gate, up) != plain(gate, up)
    if dtype == torch.float32:
        torch.testing.assert_close(glu(gate, up), plain(gate, up), rtol=2.0**-20, atol=0)
    else:
        once = (torch.nn.functional.silu(gate.float()) * up.float()).to(dtype)
        assert float(differs.float().mean()) < 0.002
        assert float((once != plain(gate, up)).float().mean()) > 0.05, "rounding once is not told apart"


def test_each_gradient_alone_has_the_bits_of_both_together(rand, same):
    gate, up, dy = rand(3, 96), rand(3, 96), rand(3, 96)
    dgate, dup = glu_bwd(gate, up, dy, needs=(True, True))
    only_gate, only_up = glu_bwd(gate, up, dy, needs=(True, False)), glu_bwd(gate, up, dy, needs=(False, True))
    assert only_gate[1] is None
    assert only_up[0] is None
    same(only_gate[0], dgate)
    same(only_up[1], dup)


def test_halves_of_a_stacked_projection(rand, same):
    stacked, dy = rand(2, 3, 2 * 1100), rand(2, 3, 1100)
    gate, up = stacked[..., :1100], stacked[..., 1100:]
    same(glu(gate, up), glu(gate.contiguous(), up.contiguous()))
    apart = glu_bwd(gate, up, dy, needs=(True, True))
    dense = glu_bwd(gate.contiguous(), up.contiguous(), dy, needs=(True, True))
    same(apart[0], dense[0])
    same(apart[1], dense[1])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_large_gates_saturate_without_nan(rand, act):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=rand(1).device)
    one = torch.ones_like(gate)
    torch.testing.assert_close(glu(gate, one, act=act), ACT2FN[act](gate))
    dgate, dup = glu_bwd(gate, one, one, needs=(True, True), act=act)
    torch.testing.assert_close(dgate, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=gate.device))
    torch.testing.assert_close(dup, ACT2FN[act](gate))


def test_no_rows(rand):
    empty = rand(0, 33)
    assert glu(empty, empty).shape == (0, 33)
    assert glu_bwd(empty, empty, empty, needs=(True, False))[0].shape == (0, 33)
