"""A linear layer and its adapter: the base in x's dtype, the adapter in float32, their sum rounded once."""

from __future__ import annotations

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import wide
from smedjan.backends.mlx_metal.linear import linear, rows
from smedjan.backends.mlx_metal.table import RULES


@RULES.rule("lora_linear")
def lora_linear(
    x: mx.array, weight: mx.array, bias: mx.array | None, a: mx.array, b: mx.array, *, scaling: float
) -> tuple[mx.array, mx.array]:
    low = wide(x) @ a.T
    base = linear(x, weight, bias)
    return (wide(base) + (low @ b.T) * scaling).astype(base.dtype), low


@RULES.rule("lora_linear_bwd")
def lora_linear_bwd(
    dy: mx.array,
    x: mx.array,
    weight: mx.array,
    a: mx.array,
    b: mx.array,
    low: mx.array,
    acc: mx.array | None,
    *,
    needs: tuple[bool, bool, bool],
    scaling: float,
) -> mx.array | tuple[mx.array, ...]:
    g = (wide(dy) * scaling) @ b
    made = []
    if needs[0]:
        dx = (wide(dy @ weight) + g @ a).astype(x.dtype)
        made.append(dx if acc is None else dx + acc)
    if needs[1]:
        made.append(rows(g).T @ rows(wide(x)))
    if needs[2]:
        made.append(rows(wide(dy) * scaling).T @ rows(low))
    return made[0] if len(made) == 1 else tuple(made)
