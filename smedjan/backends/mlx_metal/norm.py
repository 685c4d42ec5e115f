"""Norms: `mx.fast`'s where they round as declared, alone; kernels for a norm behind a residual sum, for the order of
roundings that `mx.fast` has not, and backwards. Their twins are float32 expressions.
"""

from __future__ import annotations

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import wide
from smedjan.backends.mlx_metal.kernels import norm as kernels
from smedjan.backends.mlx_metal.kernels.common import has_metal
from smedjan.backends.mlx_metal.table import RULES
from smedjan.graph.node import Node


def _fits(node: Node) -> bool:
    """Rows that a threadgroup holds; on Metal."""
    x = node.inputs[0]
    assert x is not None
    return has_metal() and x.numel > 0 and x.shape[-1] <= kernels.MAX_WIDTH


@RULES.rule("mean_last")
def mean_last(x: mx.array) -> mx.array:
    return wide(x).mean(axis=-1, keepdims=True).astype(x.dtype)


@RULES.rule("mean_last_bwd")
def mean_last_bwd(dy: mx.array, *, size: int) -> mx.array:
    return mx.broadcast_to((wide(dy) / size).astype(dy.dtype), (*dy.shape[:-1], size))


def _rstd(x: mx.array, eps: float) -> mx.array:
    return mx.rsqrt(mx.square(wide(x)).mean(axis=-1) + eps)


@RULES.rule("rms_norm", label="mx.fast.rms_norm", supports=lambda node: node.attrs["weight_cast"] == "before")
def rms_norm(
    x: mx.array, weight: mx.array, *, eps: float, weight_cast: str, offset: float
) -> tuple[mx.array, mx.array]:
    """MLX is lazy: `rstd` is computed only where a backward reads it."""
    return mx.fast.rms_norm(x, weight, eps), _rstd(x, eps)


@RULES.rule("rms_norm", supports=lambda node: node.attrs["weight_cast"] == "after")
def rms_norm_after(
    x: mx.array, weight: mx.array, *, eps: float, weight_cast: str, offset: float
) -> tuple[mx.array, mx.array]:
    rstd = _rstd(x, eps)
    return ((offset + wide(weight)) * (wide(x) * rstd[..., None])).astype(x.dtype), rstd


@RULES.rule(
    "rms_norm",
    label="metal rms_norm",
    supports=lambda node: node.attrs["weight_cast"] == "after" and _fits(node),
)
def metal_rms_norm(
    x: mx.array, weight: mx.array, *, eps: float, weight_cast: str, offset: float
) -> tuple[mx.array, ...]:
    return tuple(kernels.norm(x, None, weight, None, layer=False, eps=eps, offset=offset))


def _total(x: mx.array, delta: mx.array, factor: float) -> mx.array:
    """x + factor * delta, rounded to x's dtype once"""
    return x + delta if factor == 1.0 else (wide(x) + factor * wide(delta)).astype(x.dtype)


@RULES.rule("add_rms_norm", label="mlx add, rms_norm")
def add_rms_norm(
    x: mx.array, delta: mx.array, weight: mx.array, *, eps: float, weight_cast: str, offset: float, factor: float
) -> tuple[mx.array, ...]:
    total = _total(x, delta, factor)
    of = rms_norm if weight_cast == "before" else rms_norm_after
    return total, *of(total, weight, eps=eps, weight_cast=weight_cast, offset=offset)


@RULES.rule("add_rms_norm", label="metal add_rms_norm", supports=_fits)
def metal_add_rms_norm(
    x: mx.array, delta: mx.array, weight: mx.array, *, eps: float, weight_cast: str, offset: float, factor: float
) -> tuple[mx.array, ...]:
    before = weight_cast == "before"
    return tuple(
        kernels.norm(x, delta, weight, None, layer=False, eps=eps, offset=offset, factor=factor, cast_before=before)
    )


@RULES.rule("rms_norm_bwd")
def rms_norm_bwd(
    x: mx.array,
    weight: mx.array,
    rstd: mx.array,
    dy: mx.array,
    acc: mx.array | None,
    *,
    needs: tuple[bool, bool],
    eps: float,
    weight_cast: str,
    offset: float,
) -> mx.array | tuple[mx.array, ...]:
    """The waiting cotangent is added before the only rounding."""
    root, cotangent = rstd[..., None], wide(dy)
    normed = wide(x) * root
    made: list[mx.array] = []
    if needs[0]:
        through = cotangent * (offset + wide(weight))
        dx = root * (through - normed * (through * normed).mean(axis=-1, keepdims=True))
        made.append((dx if acc is None else dx + wide(acc)).astype(x.dtype))
    if needs[1]:
        if weight_cast == "before":
            normed = wide(normed.astype(x.dtype))
        made.append((cotangent * normed).reshape(-1, x.shape[-1]).sum(axis=0).astype(weight.dtype))
    return _one(made)


@RULES.rule("rms_norm_bwd", label="metal rms_norm_bwd", supports=_fits)
def metal_rms_norm_bwd(
    x: mx.array,
    weight: mx.array,
    rstd: mx.array,
    dy: mx.array,
    acc: mx.array | None,
    *,
    needs: tuple[bool, bool],
    eps: float,
    weight_cast: str,
    offset: float,
) -> mx.array | tuple[mx.array, ...]:
    before = weight_cast == "before"
    return _one(kernels.norm_bwd(x, weight, None, rstd, dy, acc, needs=needs, offset=offset, cast_before=before))


def _one(made: list[mx.array]) -> mx.array | tuple[mx.array, ...]:
    return tuple(made) if len(made) > 1 else made[0]


def _moments(x: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """mean and rstd [...], float32"""
    mean = wide(x).mean(axis=-1)
    return mean, mx.rsqrt(mx.square(wide(x) - mean[..., None]).mean(axis=-1) + eps)


@RULES.rule("layer_norm", label="mx.fast.layer_norm")
def layer_norm(
    x: mx.array, weight: mx.array, bias: mx.array | None, *, eps: float, composed: bool
) -> tuple[mx.array, mx.array, mx.array]:
    """MLX is lazy: the moments are computed only where a backward reads them."""
    return mx.fast.layer_norm(x, weight, bias, eps), *_moments(x, eps)


@RULES.rule("add_layer_norm", label="mlx add, layer_norm")
def add_layer_norm(
    x: mx.array,
    delta: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    *,
    eps: float,
    composed: bool,
    factor: float,
) -> tuple[mx.array, ...]:
    total = _total(x, delta, factor)
    return total, *layer_norm(total, weight, bias, eps=eps, composed=composed)


@RULES.rule("add_layer_norm", label="metal add_layer_norm", supports=_fits)
def metal_add_layer_norm(
    x: mx.array,
    delta: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    *,
    eps: float,
    composed: bool,
    factor: float,
) -> tuple[mx.array, ...]:
    return tuple(kernels.norm(x, delta, weight, bias, layer=True, eps=eps, factor=factor))


@RULES.rule("layer_norm_bwd")
def layer_norm_bwd(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    mean: mx.array,
    rstd: mx.array,
    dy: mx.array,
    acc: mx.array | None,
    *,
    needs: tuple[bool, bool, bool],
    eps: float,
    composed: bool,
) -> mx.array | tuple[mx.array, ...]:
    root, cotangent = rstd[..., None], wide(dy)
    normed = (wide(x) - mean[..., None]) * root
    made: list[mx.array] = []
    if needs[0]:
        through = cotangent * wide(weight)
        middle = through.mean(axis=-1, keepdims=True) + normed * (through * normed).mean(axis=-1, keepdims=True)
        dx = root * (through - middle)
        made.append((dx if acc is None else dx + wide(acc)).astype(x.dtype))
    if needs[1]:
        made.append((cotangent * normed).reshape(-1, x.shape[-1]).sum(axis=0).astype(weight.dtype))
    if needs[2]:
        made.append(cotangent.reshape(-1, x.shape[-1]).sum(axis=0).astype(weight.dtype))
    return _one(made)


@RULES.rule("layer_norm_bwd", label="metal layer_norm_bwd", supports=_fits)
def metal_layer_norm_bwd(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    mean: mx.array,
    rstd: mx.array,
    dy: mx.array,
    acc: mx.array | None,
    *,
    needs: tuple[bool, bool, bool],
    eps: float,
    composed: bool,
) -> mx.array | tuple[mx.array, ...]:
    return _one(kernels.norm_bwd(x, weight, mean, rstd, dy, acc, needs=needs))
