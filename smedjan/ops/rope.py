"""Rotary position embedding (Su et al. 2021, eq. 34) in Hugging Face's half-split layout."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add, mul


@op(cost=lambda node: 40 * node.outputs[0].numel)
def rope_tables(
    position_ids: Tensor,
    *,
    head_dim: int,
    theta: float,
    dtype: str,
    rope_type: str = "default",
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 1.0,
    original_max_position_embeddings: int = 0,
) -> tuple[Spec, Spec]:
    """cos(p f), sin(p f) with f_i = theta^(-2 i / head_dim), each half repeated.

    position_ids [B, T] -> cos, sin [B, 1, T, head_dim]. Angles and functions in float32, rounded to `dtype` once.
    rope_type "linear" divides every f by `factor`; "llama3" divides the wavelengths above
    original_max_position_embeddings / low_freq_factor by it and blends below, to original / high_freq_factor.
    """
    require(rope_type in ("default", "linear", "llama3"), f"rope_tables: rope_type {rope_type!r}")
    batch, seq = position_ids.shape
    spec = Spec((batch, 1, seq, head_dim), dtype)
    return spec, spec


@op
def rotate_half(x: Tensor) -> Spec:
    """y = concat(-x2, x1) of the halves x1, x2 of the last dim"""
    require(x.shape[-1] % 2 == 0, f"rotate_half: odd last dim in {x.shape}")
    return x.like()


@rotate_half.vjp
def _(dys, ins, outs, needs, acc):
    return (rotate_half_bwd(dys[0]),)


@op
def rotate_half_bwd(dy: Tensor) -> Spec:
    """dx = concat(dy2, -dy1)"""
    return dy.like()


@op(cost=lambda node: 3 * node.inputs[0].numel)
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Spec:
    """y = x * cos + rotate_half(x) * sin       x [B, H, T, D], cos and sin [B or 1, 1, T, D] -> y [B, H, T, D]"""
    require(x.ndim == 4 and cos.shape == sin.shape, f"rope: x {x.shape}, cos {cos.shape}, sin {sin.shape}")
    require(cos.shape[-1] == x.shape[-1] and cos.shape[2] == x.shape[2], f"rope: cos {cos.shape} for x {x.shape}")
    return x.like()


@rope.decompose
def _(x, cos, sin):
    return add(mul(x, cos), mul(rotate_half(x), sin))


@rope.vjp
def _(dys, ins, outs, needs, acc):
    return (rope_bwd(dys[0], *ins[1:]), None, None)


@op(cost=lambda node: 3 * node.inputs[0].numel)
def rope_bwd(dy: Tensor, cos: Tensor, sin: Tensor) -> Spec:
    """dx = dy * cos - rotate_half(dy) * sin: the rotation undone, since both halves of cos and of sin are equal"""
    return dy.like()


backward_by_decomposition(
    rope_bwd,
    rope,
    lambda dy, cos, sin: ((dy, cos, sin), {}, (dy,), (True, False, False), (None, None, None)),
)
