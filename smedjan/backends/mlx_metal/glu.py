"""Gated linear units in float32, act(gate) rounded to the gate's dtype as declared."""

from __future__ import annotations

import mlx.core as mx

from smedjan.backends.mlx_metal.activation import CURVES
from smedjan.backends.mlx_metal.elementwise import wide
from smedjan.backends.mlx_metal.table import RULES


def _act(gate: mx.array, act: str) -> mx.array:
    return CURVES[act][0](wide(gate)).astype(gate.dtype)


@RULES.rule("glu")
def glu(gate: mx.array, up: mx.array, *, act: str) -> mx.array:
    return _act(gate, act) * up


@RULES.rule("glu_bwd")
def glu_bwd(
    gate: mx.array, up: mx.array, dy: mx.array, *, needs: tuple[bool, bool], act: str
) -> mx.array | tuple[mx.array, ...]:
    made: list[mx.array] = []
    if needs[0]:
        made.append((wide(dy) * wide(up) * CURVES[act][1](wide(gate))).astype(gate.dtype))
    if needs[1]:
        made.append(dy * _act(gate, act))
    return tuple(made) if len(made) > 1 else made[0]
