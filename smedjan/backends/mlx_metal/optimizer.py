"""The update in float32, each output rounded once. Donated inputs come back as fresh arrays."""

from __future__ import annotations

import math

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import device_scalar, wide
from smedjan.backends.mlx_metal.table import RULES


@RULES.rule("accumulate")
def accumulate(total: mx.array, grad: mx.array) -> mx.array:
    return (wide(total) + wide(grad)).astype(total.dtype)


def _sum_of_squares(x: mx.array) -> mx.array:
    """By rows first: a single running float32 sum over a large matrix would lose digits."""
    squares = mx.square(wide(x))
    return (squares.sum(axis=-1) if x.ndim > 1 else squares).sum()


@RULES.rule("global_norm")
def global_norm(*grads: mx.array) -> mx.array:
    return mx.sqrt(mx.stack([_sum_of_squares(grad) for grad in grads]).sum()).astype(grads[0].dtype)


@RULES.rule("clip_coefficient")
def clip_coefficient(norm: mx.array, *, max_norm: float) -> mx.array:
    return mx.minimum(max_norm / (wide(norm) + 1e-6), 1.0).astype(norm.dtype)


@RULES.rule("keep")
def keep(new: mx.array, old: mx.array, norm: mx.array) -> mx.array:
    return mx.where(mx.isfinite(norm), new, old)


def _bias_correction(beta: float, step: mx.array) -> mx.array:
    """1 - beta^t. float32's power would lose four digits of it at beta = 0.999, t = 1; expm1 loses none."""
    return -mx.expm1(step * math.log(beta)) if beta > 0 else mx.ones((), dtype=mx.float32)


@RULES.rule("adamw_update")
def adamw_update(
    param: mx.array,
    grad: mx.array,
    exp_avg: mx.array,
    exp_avg_sq: mx.array,
    lr: mx.array | float,
    step: mx.array | int,
    grad_scale: mx.array | None,
    norm: mx.array | None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[mx.array, mx.array, mx.array]:
    rate, count, gradient = device_scalar(lr), device_scalar(step), wide(grad)
    if grad_scale is not None:
        gradient = gradient * wide(grad_scale)
    decayed = wide(param) * (1 - rate * weight_decay)
    first = wide(exp_avg) + (1 - beta1) * (gradient - wide(exp_avg))
    second = beta2 * wide(exp_avg_sq) + (1 - beta2) * mx.square(gradient)
    root = mx.sqrt(second) / mx.sqrt(_bias_correction(beta2, count)) + eps
    moved = decayed - rate / _bias_correction(beta1, count) * first / root
    made = moved.astype(param.dtype), first.astype(exp_avg.dtype), second.astype(exp_avg_sq.dtype)
    if norm is None:
        return made
    return keep(made[0], param, norm), keep(made[1], exp_avg, norm), keep(made[2], exp_avg_sq, norm)
