"""AdamW's update and the global norm on Triton: launchers of `kernels/optimizer.py`. Formulas there."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import optimizer as kernels


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_scale: Tensor | None = None,
    master: Tensor | None = None,
) -> None:
    """One step, in place in `param`, `exp_avg`, `exp_avg_sq` and, where there is one, `master`; any shape, contiguous.

    bias_correction<i> = 1 - beta<i>^step. `grad_scale` is a float32 tensor of one element that multiplies the gradient
    (a clip folded in). `master` is the float32 copy of a bf16 or f16 `param`, which becomes its rounding; without one
    the step is computed in float32 and rounded to param's dtype. `grad` is only read.
    """
    tensors = [param, grad, exp_avg, exp_avg_sq] + ([] if master is None else [master])
    assert all(tensor.shape == param.shape and tensor.is_contiguous() for tensor in tensors)
    assert master is None or master.dtype == torch.float32
    assert grad_scale is None or (grad_scale.numel() == 1 and grad_scale.dtype == torch.float32)
    if param.numel() == 0:
        return
    tile = common.flat_tile()
    # Scalars are folded here in float64 and rounded once, as in torch.
    kernels.adamw[(common.cdiv(param.numel(), tile.cols),)](
        param,
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        grad_scale,
        param.numel(),
        1.0 - lr * weight_decay,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        sqrt(bias_correction2),
        lr / bias_correction1,
        eps,
        COLS=tile.cols,
        **tile.options,
    )


def global_norm(*grads: Tensor) -> Tensor:
    """sqrt(sum of squares of all values of all gradients), a float32 tensor [] that stays on the device.

    Each gradient gives up to 1024 partial sums, one program adds them all: the order, hence the result, is fixed by the
    shapes. Only empty gradients have norm 0.
    """
    assert grads, "the norm of no gradients"
    assert all(grad.is_contiguous() for grad in grads)
    programs = [common.square_sum_programs(grad.numel()) for grad in grads]
    partial = torch.empty(sum(programs), dtype=torch.float32, device=grads[0].device)
    out = torch.empty((), dtype=torch.float32, device=grads[0].device)
    tile = common.square_sum_tile()
    first = 0
    for grad, count in zip(grads, programs, strict=True):
        if count:
            kernels.square_sum[(count,)](grad, partial, grad.numel(), first, COLS=tile.cols, **tile.options)
            first += count
    kernels.root_of_sum[(1,)](partial, out, first, COLS=tile.cols, **tile.options)
    return out
