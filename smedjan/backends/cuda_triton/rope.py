"""rope on Triton: the launcher of `kernels/rope.py`. Formula there."""

from __future__ import annotations

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import rope as kernels


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """x [B, H, T, D], cos, sin [B or 1, T, D] -> x * cos + rotate_half(x) * sin, in x's dtype.

    x may be strided (a [B, T, H, D] projection seen as [B, H, T, D]); the result keeps its order in memory.
    `inverse` is the transpose, hence the backward pass. One rounding at the end, where torch makes three.
    """
    batch, heads, tokens, head_dim = x.shape
    assert head_dim > 0, "rope of nothing"
    assert head_dim % 2 == 0, f"rope turns pairs, head_dim is {head_dim}"
    assert cos.shape in ((1, tokens, head_dim), (batch, tokens, head_dim)), f"cos {list(cos.shape)}, x {list(x.shape)}"
    assert sin.shape == cos.shape, f"sin {list(sin.shape)}, cos {list(cos.shape)}"
    assert x.stride(3) == cos.stride(2) == sin.stride(2) == 1, f"heads are not contiguous: {x.stride()}"
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    tile = common.rope_tile(head_dim)
    group = common.rope_heads(heads, tokens)
    kernels.rope[(common.cdiv(tokens, tile.rows), common.cdiv(heads, group), batch)](
        x,
        cos,
        sin,
        y,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        y.stride(0),
        y.stride(1),
        y.stride(2),
        cos.stride(0) if cos.shape[0] == batch else 0,
        cos.stride(1),
        sin.stride(0) if sin.shape[0] == batch else 0,
        sin.stride(1),
        heads,
        tokens,
        head_dim // 2,
        INVERSE=inverse,
        HEADS=group,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )
    return y
