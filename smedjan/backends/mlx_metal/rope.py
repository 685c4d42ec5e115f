"""Rotary tables and the half-split rotation. `mx.fast.rope` takes a base and an offset, not tables: it does not fit."""

from __future__ import annotations

import math
import struct

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import DTYPES, wide
from smedjan.backends.mlx_metal.table import RULES


def _f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def inverse_frequencies(
    *,
    head_dim: int,
    theta: float,
    rope_type: str,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original: int,
) -> list[float]:
    """f_i on the host, rounded to float32 after each operation as transformers does.

    An error of one ulp in f turns the angle at position p by p * 6e-8: it must be transformers' float32 number, not a
    better one.
    """
    made = []
    for index in range(0, head_dim, 2):
        freq = _f32(1.0 / _f32(theta ** _f32(index / head_dim)))
        if rope_type == "linear":
            freq = _f32(freq / factor)
        elif rope_type == "llama3":
            # torch divides a number by a tensor as a product with the reciprocal.
            wavelen = _f32(_f32(2 * math.pi) * _f32(1.0 / freq))
            if wavelen > original / low_freq_factor:
                freq = _f32(freq / factor)
            elif wavelen >= original / high_freq_factor:
                smooth = _f32(
                    _f32(_f32(original * _f32(1.0 / wavelen)) - low_freq_factor)
                    / _f32(high_freq_factor - low_freq_factor)
                )
                freq = _f32(_f32(_f32(_f32(1 - smooth) * freq) / factor) + _f32(smooth * freq))
        made.append(freq)
    return made


@RULES.rule("rope_tables")
def rope_tables(
    position_ids: mx.array,
    *,
    head_dim: int,
    theta: float,
    dtype: str,
    rope_type: str,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[mx.array, mx.array]:
    freqs = inverse_frequencies(
        head_dim=head_dim,
        theta=theta,
        rope_type=rope_type,
        factor=factor,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original=original_max_position_embeddings,
    )
    half = wide(position_ids)[:, None, :, None] * mx.array(freqs, dtype=mx.float32)
    angles = mx.concatenate([half, half], axis=-1)
    return mx.cos(angles).astype(DTYPES[dtype]), mx.sin(angles).astype(DTYPES[dtype])


@RULES.rule("rotate_half")
def rotate_half(x: mx.array) -> mx.array:
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([-second, first], axis=-1)


@RULES.rule("rotate_half_bwd")
def rotate_half_bwd(dy: mx.array) -> mx.array:
    first, second = mx.split(dy, 2, axis=-1)
    return mx.concatenate([second, -first], axis=-1)


@RULES.rule("rope")
def rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (wide(x) * wide(cos) + wide(rotate_half(x)) * wide(sin)).astype(x.dtype)


@RULES.rule("rope_bwd")
def rope_bwd(dy: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (wide(dy) * wide(cos) + wide(rotate_half_bwd(dy)) * wide(sin)).astype(dy.dtype)
