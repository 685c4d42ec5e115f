"""rope on Triton: the launcher of `kernels/rope.py`, whose formula stands there; and its tables, made on the device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import rope as kernels
from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.backends.torch_reference.rope import inverse_frequencies
from smedjan.ops.rope import RopeConfig


@lru_cache(maxsize=64)
def _frequencies(rope: RopeConfig, head_dim: int, tokens: int, device: torch.device) -> Tensor:
    """f_i of `rope` for so many tokens, [D / 2] float32, brought to the device once."""
    return inverse_frequencies(rope, head_dim, tokens).to(device)


def _stretched(rope: RopeConfig, head_dim: int, tokens: Tensor) -> Tensor:
    """f_i of a dynamic rope for `tokens` (a scalar on the device) past its length, [D / 2] float32."""
    dim, most = rope.rotary_dim(head_dim), rope.max_position_embeddings
    assert rope.factor is not None
    assert most is not None
    stretch = rope.factor * tokens.float() / most - (rope.factor - 1)
    theta = rope.rope_theta * stretch ** (dim / (dim - 2))
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=tokens.device).float() / dim)


def rope_tables(
    position_ids: Tensor, *, rope: RopeConfig, head_dim: int, dtype: str, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """position_ids [B, T] -> cos, sin [B, 1, T, D]. Where the frequencies hang on how many tokens there are, the device
    decides: the host waits for no value, which a CUDA graph would not allow."""
    switch = {"longrope": rope.original_max_position_embeddings, "dynamic": rope.max_position_embeddings}
    turn = switch.get(rope.rope_type)
    frequencies = _frequencies(rope, head_dim, turn or 1, position_ids.device)
    if turn is not None:
        tokens = position_ids.max() + 1
        if rope.rope_type == "dynamic":
            beyond = _stretched(rope, head_dim, tokens)
        else:
            beyond = _frequencies(rope, head_dim, turn + 1, position_ids.device)
        frequencies = torch.where(tokens > turn, beyond, frequencies)
    angles = position_ids[..., None].float() * frequencies
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    cos, sin = (table.mul_(rope.attention_scaling).to(DTYPES[dtype]) for table in (angles.cos(), angles.sin()))
    return cos.unsqueeze(1), sin.unsqueeze(1)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False) -> Tensor:
    """x [B, H, T, head_dim], cos, sin [B or 1, T, D] -> x * cos + rotate_half(x) * sin over a head's first D dims, in
    x's dtype, the others as they are.

    x may be strided (a [B, T, H, D] projection seen as [B, H, T, D]); the result keeps its order in memory.
    `inverse` is the transpose, hence the backward pass. One rounding at the end, where torch makes three.
    """
    batch, heads, tokens, head_dim = x.shape
    dim = cos.shape[-1]
    assert dim % 2 == 0, f"rope turns pairs, not {dim} dims"
    assert 0 < dim <= head_dim, f"rope of {dim} dims of {head_dim}"
    assert cos.shape in ((1, tokens, dim), (batch, tokens, dim)), f"cos {list(cos.shape)}, x {list(x.shape)}"
    assert sin.shape == cos.shape, f"sin {list(sin.shape)}, cos {list(cos.shape)}"
    assert x.stride(3) == cos.stride(2) == sin.stride(2) == 1, f"heads are not contiguous: {x.stride()}"
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    tile = common.rope_tile(dim)
    rest = head_dim - dim
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
        dim // 2,
        rest,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        HEADS=group,
        ROWS=tile.rows,
        COLS=tile.cols,
        REST=common.next_power_of_2(rest) if rest else 0,
        **tile.options,
    )
    return y
