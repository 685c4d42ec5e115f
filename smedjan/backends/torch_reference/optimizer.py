"""torch.optim.AdamW's single-tensor step and torch.nn.utils.clip_grad_norm_, call for call; narrower state."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.random import MASK, philox
from smedjan.backends.torch_reference.table import RULES
from smedjan.ops.optimizer import BLOCK, ZERO, magnitudes, middles


@RULES.rule("accumulate")
def accumulate(total, grad):
    return total.add_(grad)


@RULES.rule("global_norm")
def global_norm(*grads):
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, 2.0) for g in grads]), 2.0)


@RULES.rule("clip_coefficient")
def clip_coefficient(norm, *, max_norm):
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def skipped(norm):
    """Whether the step changes nothing. A select by the host, which waits for the norm: exact steps keep their bits."""
    return norm is not None and not bool(norm.isfinite())


@RULES.rule("keep")
def keep(new, old, norm):
    return old if skipped(norm) else old.copy_(new)


@RULES.rule("adamw_update", temporaries=lambda node: 3 * node.inputs[0].nbytes)
def adamw_update(param, grad, exp_avg, exp_avg_sq, lr, step, grad_scale, norm, *, beta1, beta2, eps, weight_decay):
    if skipped(norm):
        return param, exp_avg, exp_avg_sq
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


@RULES.rule("stochastic_round")
def stochastic_round(x, step, seed, *, site):
    count, seed = x.numel(), int(seed)
    index = torch.arange((count + 7) // 8, dtype=torch.int64, device=x.device)
    words = torch.stack(philox((index, site, int(step), MASK), (seed & MASK, seed >> 32 & MASK)), dim=-1)
    chance = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)[:count].reshape(x.shape)
    bits = (x.contiguous().view(torch.int32).to(torch.int64) & MASK) + chance >> 16
    # A carry could make a NaN of another number.
    return torch.where(x.isnan(), 0x7FC0, bits).to(torch.int16).view(torch.bfloat16)


def _magnitudes(signed, device):
    return tuple(torch.tensor(values(signed=signed), device=device) for values in (magnitudes, middles))


@RULES.rule("dequantize_blocks")
def dequantize_blocks(codes, absmax, *, signed):
    levels, _ = _magnitudes(signed, codes.device)
    if signed:
        levels = torch.cat((-levels[1:-1].flip(0), levels))
    return (levels[codes.to(torch.int64).reshape(-1, BLOCK)] * absmax[:, None]).reshape(codes.shape)


@RULES.rule("quantize_blocks")
def quantize_blocks(x, *, signed):
    _, between = _magnitudes(signed, x.device)
    blocks = x.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=-1)
    # A product with the reciprocal, by definition; a smaller scale's may be infinite.
    level = torch.searchsorted(between, blocks.abs() * (1.0 / absmax.clamp(min=2.0**-126))[:, None])
    if signed:
        code = torch.where(blocks < 0, ZERO - level.clamp(max=ZERO), ZERO + level)
    else:
        code = torch.where(blocks > 0, level.clamp(min=1), level)
    return code.to(torch.uint8).reshape(x.shape), absmax
