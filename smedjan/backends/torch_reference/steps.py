"""torch.optim.Muon's, transformers' Adafactor's and the published Lion's and Sophia's steps, call for call."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.optimizer import skipped
from smedjan.backends.torch_reference.table import RULES
from smedjan.ops.steps import ADAFACTOR_EPS, ITERATIONS, MUON_EPS, NEWTON_SCHULZ, SOPHIA_EPS


def _scaled(grad, grad_scale):
    return grad if grad_scale is None else grad * grad_scale


@RULES.rule("lion_update")
def lion_update(param, grad, exp_avg, lr, norm, grad_scale, *, beta1, beta2, weight_decay):
    if skipped(norm):
        return param, exp_avg
    grad = _scaled(grad, grad_scale)
    param.mul_(1 - lr * weight_decay)
    param.add_(exp_avg.clone().mul_(beta1).add(grad, alpha=1 - beta1).sign_(), alpha=-lr)
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
    return param, exp_avg


def newton_schulz(x, dtype):
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[0] > x.shape[1]
    y = x.to(dtype, copy=True)
    y = y.T if tall else y
    y.div_(y.norm().clamp(min=MUON_EPS))
    for _ in range(ITERATIONS):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if tall else y


def muon_step(param, grad, buffer, lr, norm, grad_scale, *, momentum, ratio, weight_decay, dtype):
    if skipped(norm):
        return param, buffer
    grad = _scaled(grad, grad_scale)
    buffer.lerp_(grad, 1 - momentum)
    step = newton_schulz(grad.lerp(buffer, momentum), dtype)
    param.mul_(1 - lr * weight_decay)
    param.add_(step, alpha=-(lr * ratio))
    return param, buffer


@RULES.rule("muon_update")
def muon_update(*tensors, **attrs):
    return muon_step(*tensors, **attrs, dtype=torch.bfloat16)


@RULES.rule("adafactor_update")
def adafactor_update(param, grad, first, second, lr, beta2t, norm, grad_scale, *, threshold, weight_decay):
    if skipped(norm):
        return (param, first) if second is None else (param, first, second)
    grad = _scaled(grad, grad_scale)
    step = (grad**2) + ADAFACTOR_EPS
    if second is None:
        first.mul_(beta2t).add_(step, alpha=1.0 - beta2t)
        step = first.rsqrt().mul_(grad)
    else:
        first.mul_(beta2t).add_(step.mean(dim=-1), alpha=1.0 - beta2t)
        second.mul_(beta2t).add_(step.mean(dim=-2), alpha=1.0 - beta2t)
        rows = (first / first.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        step = torch.mul(rows, second.unsqueeze(-2).rsqrt()).mul_(grad)
    step.div_((step.norm(2) / (step.numel() ** 0.5) / threshold).clamp_(min=1.0))
    step.mul_(lr)
    if weight_decay != 0:
        param.add_(param, alpha=-weight_decay * lr)
    param.add_(-step)
    return (param, first) if second is None else (param, first, second)


@RULES.rule("sophia_update")
def sophia_update(param, grad, exp_avg, hessian, lr, norm, grad_scale, *, beta1, rho, weight_decay):
    if skipped(norm):
        return param, exp_avg
    param.mul_(1 - lr * weight_decay)
    exp_avg.mul_(beta1).add_(_scaled(grad, grad_scale), alpha=1 - beta1)
    ratio = (exp_avg.abs() / (rho * hessian + SOPHIA_EPS)).clamp(None, 1)
    param.addcmul_(exp_avg.sign(), ratio, value=-lr)
    return param, exp_avg


@RULES.rule("hessian_update")
def hessian_update(hessian, grad, count, norm, *, beta2):
    if skipped(norm):
        return hessian
    grad = grad.to(hessian.dtype)
    return hessian.mul_(beta2).addcmul_(grad, grad, value=(1 - beta2) * count)


@RULES.rule("average_update")
def average_update(average, param, norm, *, decay):
    return average if skipped(norm) else average.lerp_(param.float(), 1 - decay)
