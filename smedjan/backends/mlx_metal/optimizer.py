"""The update in float32, each output rounded once; narrower state. Donated inputs come back as fresh arrays."""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import device_scalar, wide
from smedjan.backends.mlx_metal.random import philox, word
from smedjan.backends.mlx_metal.table import RULES
from smedjan.ops.optimizer import BLOCK, ZERO, magnitudes, middles


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


@RULES.rule("stochastic_round")
def stochastic_round(x: mx.array, step: mx.array | int, seed: mx.array, *, site: int) -> mx.array:
    count, key = x.size, seed.astype(mx.uint64)
    index = mx.arange((count + 7) // 8, dtype=mx.uint32)
    number, last = device_scalar(step, mx.uint32), word(0xFFFFFFFF)
    halves = (key.astype(mx.uint32), (key >> mx.array(32, dtype=mx.uint64)).astype(mx.uint32))
    words = mx.stack([*philox((index, word(site), number, last), halves)], axis=-1)
    chance = mx.stack([words & word(0xFFFF), words >> word(16)], axis=-1).reshape(-1)[:count].reshape(x.shape)
    bits = (x.view(mx.uint32) + chance) >> word(16)
    # A carry could make a NaN of another number.
    return mx.where(mx.isnan(x), word(0x7FC0), bits).astype(mx.uint16).view(mx.bfloat16)


@cache
def _levels(signed: bool) -> mx.array:
    """What each of the 256 codes stands for."""
    found = list(magnitudes(signed=signed))
    return mx.array([-level for level in found[-2:0:-1]] + found if signed else found)


@cache
def _middles(signed: bool) -> mx.array:
    """Padded to 255, so that eight halvings find a place in them."""
    found = middles(signed=signed)
    return mx.array([*found, *[math.inf] * (255 - len(found))])


def _below(values: mx.array, x: mx.array) -> mx.array:
    """How many of 255 ascending `values` are below each of x, by halving: MLX has no searchsorted."""
    found = mx.zeros(x.shape, dtype=mx.int32)
    for width in (128, 64, 32, 16, 8, 4, 2, 1):
        found = mx.where(values[found + (width - 1)] < x, found + width, found)
    return found


@RULES.rule("dequantize_blocks")
def dequantize_blocks(codes: mx.array, absmax: mx.array, *, signed: bool) -> mx.array:
    return (_levels(signed)[codes.reshape(-1, BLOCK)] * absmax[:, None]).reshape(codes.shape)


@RULES.rule("quantize_blocks")
def quantize_blocks(x: mx.array, *, signed: bool) -> tuple[mx.array, mx.array]:
    blocks = x.reshape(-1, BLOCK)
    absmax = mx.abs(blocks).max(axis=-1)
    # A product with the reciprocal, by definition; a smaller scale's may be infinite.
    level = _below(_middles(signed), mx.abs(blocks) * (1.0 / mx.maximum(absmax, 2.0**-126))[:, None])
    if signed:
        code = mx.where(blocks < 0, ZERO - mx.minimum(level, ZERO), ZERO + level)
    else:
        code = mx.where(blocks > 0, mx.maximum(level, 1), level)
    return code.astype(mx.uint8).reshape(x.shape), absmax
