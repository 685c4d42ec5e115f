"""Gated linear units in float32, act(gate) rounded to the gate's dtype as declared."""

from __future__ import annotations

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import silu, silu_slope, wide
from smedjan.backends.mlx_metal.table import RULES


@RULES.rule("glu")
def glu(gate: mx.array, up: mx.array, *, act: str) -> mx.array:
    assert act == "silu", act
    return silu(gate) * up


@RULES.rule("glu_bwd")
def glu_bwd(
    gate: mx.array, up: mx.array, dy: mx.array, *, needs: tuple[bool, bool], act: str
) -> mx.array | tuple[mx.array, ...]:
    assert act == "silu", act
    made: list[mx.array] = []
    if needs[0]:
        made.append((wide(dy) * wide(up) * silu_slope(wide(gate))).astype(gate.dtype))
    if needs[1]:
        made.append(dy * silu(gate))
    return tuple(made) if len(made) > 1 else made[0]
