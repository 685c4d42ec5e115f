"""torch.optim.AdamW's single-tensor step and torch.nn.utils.clip_grad_norm_, call for call."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES


@RULES.rule("accumulate")
def accumulate(total, grad):
    return total.add_(grad)


@RULES.rule("global_norm")
def global_norm(*grads):
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, 2.0) for g in grads]), 2.0)


@RULES.rule("clip_coefficient")
def clip_coefficient(norm, *, max_norm):
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


@RULES.rule("adamw_update")
def adamw_update(param, grad, exp_avg, exp_avg_sq, lr, step, grad_scale, *, beta1, beta2, eps, weight_decay):
    if grad_scale is not None:
        grad = grad * grad_scale
    if weight_decay != 0:
        param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1**step)
    denom = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denom, value=-step_size)
    return param, exp_avg, exp_avg_sq
