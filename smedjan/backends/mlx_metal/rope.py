"""Rotary tables and the rotation, alone or with the norms of queries and keys. `mx.fast.rope` takes a base and an
offset, not tables: it does not fit."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import DTYPES, wide
from smedjan.backends.mlx_metal.kernels import rope as kernels
from smedjan.backends.mlx_metal.kernels.common import has_metal
from smedjan.backends.mlx_metal.table import RULES
from smedjan.graph.node import Node
from smedjan.ops.rope import RopeConfig


def _f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def _rounded(values: Iterable[float]) -> list[float]:
    return [_f32(value) for value in values]


def inverse_frequencies(rope: RopeConfig, head_dim: int, *, long: bool = False) -> list[float]:
    """f_i on the host, rounded to float32 after each operation as transformers does. `long`: longrope's other set.

    An error of one ulp in f turns the angle at position p by p * 6e-8: it must be transformers' float32 number, not a
    better one.
    """
    powers = _powers(rope.rope_theta, rope.rotary_dim(head_dim))
    if rope.rope_type == "longrope":
        factors = rope.long_factor if long else rope.short_factor
        assert factors is not None
        return [_f32(1.0 / _f32(_f32(one) * power)) for one, power in zip(factors, powers, strict=True)]
    if rope.rope_type == "yarn":
        return _yarn(rope, rope.rotary_dim(head_dim), powers)
    plain = _rounded(1.0 / power for power in powers)
    if rope.rope_type == "linear":
        assert rope.factor is not None
        return _rounded(freq / rope.factor for freq in plain)
    return [_llama3(rope, freq) for freq in plain] if rope.rope_type == "llama3" else plain


def _powers(theta: float, dim: int) -> list[float]:
    """theta^(2 i / D)"""
    return [_f32(theta ** _f32(index / dim)) for index in range(0, dim, 2)]


def _llama3(rope: RopeConfig, freq: float) -> float:
    factor, low, high = rope.factor, rope.low_freq_factor, rope.high_freq_factor
    original = rope.original_max_position_embeddings
    assert factor is not None and low is not None and high is not None and original is not None  # noqa: PT018
    # torch divides a number by a tensor as a product with the reciprocal.
    wavelen = _f32(_f32(2 * math.pi) * _f32(1.0 / freq))
    if wavelen > original / low:
        return _f32(freq / factor)
    if wavelen < original / high:
        return freq
    smooth = _f32(_f32(_f32(original * _f32(1.0 / wavelen)) - low) / _f32(high - low))
    return _f32(_f32(_f32(_f32(1 - smooth) * freq) / factor) + _f32(smooth * freq))


def _yarn(rope: RopeConfig, dim: int, powers: list[float]) -> list[float]:
    original, factor = rope.original_max_position_embeddings, rope.factor
    assert original is not None
    assert factor is not None

    def place(turns: float) -> float:
        return (dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(rope.rope_theta))

    low, high = place(rope.beta_fast or 32), place(rope.beta_slow or 1)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    made = []
    for index, power in enumerate(powers):
        ramp = min(max(_f32(_f32(index - _f32(low)) / _f32(high - low)), 0.0), 1.0)
        kept = _f32(1 - ramp)
        between = _f32(_f32(1.0 / _f32(factor * power)) * _f32(1 - kept))
        made.append(_f32(between + _f32(_f32(1.0 / power) * kept)))
    return made


def _frequencies(rope: RopeConfig, head_dim: int, position_ids: mx.array) -> mx.array:
    """[D / 2] float32. Where they hang on how many tokens there are, the device decides: no value is waited for."""
    fixed = mx.array(inverse_frequencies(rope, head_dim), dtype=mx.float32)
    tokens = position_ids.max() + 1
    if rope.rope_type == "longrope":
        longer = mx.array(inverse_frequencies(rope, head_dim, long=True), dtype=mx.float32)
        assert rope.original_max_position_embeddings is not None
        return mx.where(tokens > rope.original_max_position_embeddings, longer, fixed)
    if rope.rope_type != "dynamic":
        return fixed
    dim, most = rope.rotary_dim(head_dim), rope.max_position_embeddings
    assert rope.factor is not None
    assert most is not None
    stretch = rope.factor * wide(mx.maximum(tokens, most)) / most - (rope.factor - 1)
    theta = rope.rope_theta * stretch ** (dim / (dim - 2))
    exponents = mx.array(_rounded(index / dim for index in range(0, dim, 2)), dtype=mx.float32)
    return mx.where(tokens > most, 1.0 / theta**exponents, fixed)


@RULES.rule("rope_tables")
def rope_tables(
    position_ids: mx.array, *, rope: RopeConfig, head_dim: int, dtype: str, interleaved: bool
) -> tuple[mx.array, mx.array]:
    half = wide(position_ids)[:, None, :, None] * _frequencies(rope, head_dim, position_ids)
    angles = mx.repeat(half, 2, axis=-1) if interleaved else mx.concatenate([half, half], axis=-1)
    scaling, kind = rope.attention_scaling, DTYPES[dtype]
    return (mx.cos(angles) * scaling).astype(kind), (mx.sin(angles) * scaling).astype(kind)


def _pairs(x: mx.array, interleaved: bool) -> tuple[mx.array, mx.array]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = mx.split(x, 2, axis=-1)
    return first, second


def _joined(first: mx.array, second: mx.array, interleaved: bool) -> mx.array:
    if interleaved:
        return mx.stack([first, second], axis=-1).flatten(-2)
    return mx.concatenate([first, second], axis=-1)


@RULES.rule("rotate_half")
def rotate_half(x: mx.array, *, interleaved: bool) -> mx.array:
    first, second = _pairs(x, interleaved)
    return _joined(-second, first, interleaved)


@RULES.rule("rotate_half_bwd")
def rotate_half_bwd(dy: mx.array, *, interleaved: bool) -> mx.array:
    first, second = _pairs(dy, interleaved)
    return _joined(second, -first, interleaved)


def _turned(x: mx.array, cos: mx.array, sin: mx.array, rotate: Callable[..., mx.array], interleaved: bool) -> mx.array:
    """In float32, of x in any dtype."""
    dim = cos.shape[-1]
    part = wide(x[..., :dim])
    y = part * wide(cos) + rotate(part, interleaved=interleaved) * wide(sin)
    return y if dim == x.shape[-1] else mx.concatenate([y, wide(x[..., dim:])], axis=-1)


def _fits(node: Node) -> bool:
    """Heads that a simdgroup holds; on Metal."""
    given = [x for x in node.inputs[:2] if x is not None]
    return has_metal() and all(x.numel > 0 and x.shape[3] <= kernels.MAX_HEAD_DIM for x in given)


@RULES.rule("rope")
def rope(x: mx.array, cos: mx.array, sin: mx.array, *, interleaved: bool, upcast: str) -> mx.array:
    return _turned(x, cos, sin, rotate_half, interleaved).astype(x.dtype)


@RULES.rule("rope", label="metal rope", supports=_fits)
def metal_rope(x: mx.array, cos: mx.array, sin: mx.array, *, interleaved: bool, upcast: str) -> mx.array:
    return kernels.turn([x], [], cos, sin, interleaved=interleaved)[0]


@RULES.rule("rope_bwd")
def rope_bwd(dy: mx.array, cos: mx.array, sin: mx.array, *, interleaved: bool, upcast: str) -> mx.array:
    return _turned(dy, cos, sin, rotate_half_bwd, interleaved).astype(dy.dtype)


@RULES.rule("rope_bwd", label="metal rope", supports=_fits)
def metal_rope_bwd(dy: mx.array, cos: mx.array, sin: mx.array, *, interleaved: bool, upcast: str) -> mx.array:
    return kernels.turn([dy], [], cos, sin, interleaved=interleaved, inverse=True)[0]


def _normed(x: mx.array, weight: mx.array, eps: float, offset: float) -> tuple[mx.array, mx.array, mx.array]:
    """x rstd, rstd and offset + weight, in float32"""
    root = mx.rsqrt(mx.square(wide(x)).mean(axis=-1, keepdims=True) + eps)
    return wide(x) * root, root, offset + wide(weight)


@RULES.rule("qk_norm_rope")
def qk_norm_rope(
    q: mx.array,
    k: mx.array,
    q_weight: mx.array | None,
    k_weight: mx.array | None,
    cos: mx.array,
    sin: mx.array,
    *,
    eps: float,
    weight_cast: str,
    offset: float,
    interleaved: bool,
    upcast: str,
) -> tuple[mx.array, mx.array]:
    """`weight_cast` and `upcast` name roundings that only an exact backend reproduces: everything is rounded once."""

    def turned(x: mx.array, weight: mx.array | None) -> mx.array:
        value = x
        if weight is not None:
            normed, _, gain = _normed(x, weight, eps, offset)
            value = normed * gain
        return _turned(value, cos, sin, rotate_half, interleaved).astype(x.dtype)

    return turned(q, q_weight), turned(k, k_weight)


@RULES.rule("qk_norm_rope", label="metal qk_norm_rope", supports=_fits)
def metal_qk_norm_rope(
    q: mx.array,
    k: mx.array,
    q_weight: mx.array | None,
    k_weight: mx.array | None,
    cos: mx.array,
    sin: mx.array,
    *,
    eps: float,
    weight_cast: str,
    offset: float,
    interleaved: bool,
    upcast: str,
) -> tuple[mx.array, ...]:
    weights = [weight for weight in (q_weight, k_weight) if weight is not None]
    return tuple(kernels.turn([q, k], weights, cos, sin, interleaved=interleaved, eps=eps, offset=offset))


def _norm_rope_bwd(
    x: mx.array,
    dy: mx.array,
    weight: mx.array,
    cos: mx.array,
    sin: mx.array,
    *,
    needs: tuple[bool, bool],
    interleaved: bool,
    eps: float,
    offset: float,
) -> list[mx.array]:
    """The twin of `kernels/rope.py`'s `norm_rope_bwd`."""
    g = _turned(dy, cos, sin, rotate_half_bwd, interleaved)
    normed, root, gain = _normed(x, weight, eps, offset)
    made = []
    if needs[0]:
        through = g * gain
        made.append((root * (through - normed * (through * normed).mean(axis=-1, keepdims=True))).astype(x.dtype))
    if needs[1]:
        made.append((g * normed).sum(axis=(0, 1, 2)).astype(weight.dtype))
    return made


def _qk_bwd(
    norm_rope_bwd: Callable[..., list[mx.array]],
    turn_back: Callable[..., list[mx.array]],
    dys: Sequence[mx.array | None],
    xs: Sequence[mx.array | None],
    weights: Sequence[mx.array | None],
    cos: mx.array,
    sin: mx.array,
    *,
    needs: tuple[bool, bool, bool, bool],
    interleaved: bool,
    **attrs: Any,
) -> mx.array | tuple[mx.array, ...]:
    """What `needs` names, of q and of k, in the op's order: both gradients of heads, then both of weights."""
    heads: list[mx.array] = []
    sums: list[mx.array] = []
    if weights[0] is None:
        heads = turn_back([dy for dy, need in zip(dys, needs, strict=False) if need], cos, sin, interleaved)
    for dy, x, weight, wants in zip(dys, xs, weights, (needs[::2], needs[1::2]), strict=True):
        if dy is not None and x is not None and weight is not None and any(wants):
            found = norm_rope_bwd(x, dy, weight, cos, sin, needs=wants, interleaved=interleaved, **attrs)
            heads += found[: wants[0]]
            sums += found[wants[0] :]
    made = (*heads, *sums)
    return made if len(made) > 1 else made[0]


@RULES.rule("qk_norm_rope_bwd")
def qk_norm_rope_bwd(*arrays: Any, eps: float, weight_cast: str, offset: float, upcast: str, **attrs: Any) -> Any:
    def turn_back(dys: list[mx.array], cos: mx.array, sin: mx.array, interleaved: bool) -> list[mx.array]:
        return [_turned(dy, cos, sin, rotate_half_bwd, interleaved).astype(dy.dtype) for dy in dys]

    heads = (arrays[:2], arrays[2:4], arrays[4:6], *arrays[6:])
    return _qk_bwd(_norm_rope_bwd, turn_back, *heads, eps=eps, offset=offset, **attrs)


@RULES.rule("qk_norm_rope_bwd", label="metal qk_norm_rope_bwd", supports=_fits)
def metal_qk_norm_rope_bwd(*arrays: Any, eps: float, weight_cast: str, offset: float, upcast: str, **attrs: Any) -> Any:
    def turn_back(dys: list[mx.array], cos: mx.array, sin: mx.array, interleaved: bool) -> list[mx.array]:
        return kernels.turn(dys, [], cos, sin, interleaved=interleaved, inverse=True)

    heads = (arrays[:2], arrays[2:4], arrays[4:6], *arrays[6:])
    return _qk_bwd(kernels.norm_rope_bwd, turn_back, *heads, eps=eps, offset=offset, **attrs)
