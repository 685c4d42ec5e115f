"""AdamW and the global norm on Triton against torch.optim.AdamW and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.optimizer import adamw_update, global_norm
from tests.tolerances import assert_close

SETTINGS = [(1e-2, 0.9, 0.999, 1e-8, 0.01), (1e-1, 0.8, 0.95, 1e-6, 0.0), (1e-2, 0.3, 0.5, 1e-8, 0.1)]
"""lr, beta1, beta2, eps, weight_decay; the last takes the other branch of lerp (1 - beta1 >= 0.5)."""


def reference(param: Tensor, grads: list[Tensor], setting: tuple[float, ...]) -> list[Tensor]:
    """param, exp_avg, exp_avg_sq after torch.optim.AdamW's single-tensor steps, in param's dtype."""
    lr, beta1, beta2, eps, decay = setting
    leaf = param.clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [leaf], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, foreach=False, fused=False
    )
    for grad in grads:
        leaf.grad = grad.to(param.dtype)
        optimizer.step()
    state = optimizer.state[leaf]
    return [leaf.detach(), state["exp_avg"], state["exp_avg_sq"]]


def ours(
    param: Tensor,
    grads: list[Tensor],
    setting: tuple[float, ...],
    *,
    grad_scale: Tensor | None = None,
    master: Tensor | None = None,
) -> list[Tensor]:
    lr, beta1, beta2, eps, decay = setting
    param = param.clone()
    exp_avg, exp_avg_sq = torch.zeros(2, *param.shape, device=param.device).unbind()
    for step, grad in enumerate(grads, 1):
        adamw_update(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=decay,
            bias_correction1=1 - beta1**step,
            bias_correction2=1 - beta2**step,
            grad_scale=grad_scale,
            master=master,
        )
    return [param, exp_avg, exp_avg_sq]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (33, 3), (576, 5)], ids=str)
def test_ten_steps_are_within_the_derived_bound(rand, shape, setting):
    param, grads = rand(*shape), [rand(*shape, scale=10.0 ** (step % 3 - 1)) for step in range(10)]
    true = reference(param.double(), grads, setting)
    plain = reference(param, grads, setting)
    names = ("param", "exp_avg", "exp_avg_sq")
    for name, value, exact, torch32 in zip(names, ours(param, grads, setting), true, plain, strict=True):
        assert_close(name, value, exact, torch32)


def test_grad_scale_multiplies_the_gradient_and_leaves_it(rand, device, same):
    param, grads = rand(33), [rand(33) for _ in range(3)]
    before = [grad.clone() for grad in grads]
    scaled = ours(param, grads, SETTINGS[0], grad_scale=torch.tensor(0.25, device=device))
    assert all(torch.equal(*pair) for pair in zip(grads, before, strict=True))
    for value, exact in zip(scaled, ours(param, [grad * 0.25 for grad in grads], SETTINGS[0]), strict=True):
        same(value, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_master_takes_the_float32_steps_and_param_is_its_rounding(rand, dtype, same):
    master = rand(1100)
    grads = [rand(1100, dtype=dtype) for _ in range(3)]
    exact, *state = ours(master, [grad.float() for grad in grads], SETTINGS[0])
    param, *low_state = ours(master.to(dtype), grads, SETTINGS[0], master=master)
    same(master, exact)
    assert torch.equal(param, master.to(dtype))
    for value, low in zip(state, low_state, strict=True):
        same(low, value)


def test_without_a_master_a_bfloat16_param_is_the_rounding_of_one_step(rand, same):
    param, grad = rand(1100, dtype=torch.bfloat16), rand(1100)
    (exact, *_), (rounded, *_) = ours(param.float(), [grad], SETTINGS[0]), ours(param, [grad], SETTINGS[0])
    same(rounded, exact.to(torch.bfloat16))


def test_nothing_to_update(rand):
    assert ours(rand(0), [rand(0)], SETTINGS[0])[0].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [[1], [7, 33], [3, 0, 8192, 8193, 40000], [100000]], ids=str)
def test_global_norm_is_within_the_derived_bound(rand, sizes, dtype):
    grads = [rand(size, dtype=dtype, scale=float(index + 1)) for index, size in enumerate(sizes)]
    norm = global_norm(*grads)
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    exact = torch.cat([grad.double() for grad in grads]).norm()
    assert_close("norm", norm, exact, torch.cat([grad.float() for grad in grads]).norm())


def test_global_norm_takes_any_shape_and_counts_every_program_once(rand, monkeypatch):
    monkeypatch.setattr(common, "NORM_PROGRAMS", 2)
    grad = rand(7, 5000)
    assert common.square_sum_programs(grad.numel()) == 2
    torch.testing.assert_close(global_norm(grad).double(), grad.double().norm(), rtol=2.0**-20, atol=0)


def test_more_partial_sums_than_are_added_at_once(rand, monkeypatch):
    monkeypatch.setattr(common, "square_sum_tile", lambda: common.Tile(rows=1, cols=64, num_warps=1))
    grad = rand(20000)
    assert common.square_sum_programs(grad.numel()) == 157
    torch.testing.assert_close(global_norm(grad).double(), grad.double().norm(), rtol=2.0**-20, atol=0)


def test_global_norm_of_nothing_is_zero_and_of_nan_is_nan(rand, device):
    assert float(global_norm(rand(0))) == 0.0
    bad = rand(9)
    bad[3] = float("nan")
    assert bool(global_norm(rand(9), bad).isnan())
    bad[3] = float("inf")
    assert float(global_norm(bad)) == float("inf")
