"""Rotary tables with transformers' float32 arithmetic (modeling_rope_utils), and the half-split rotation."""

from __future__ import annotations

import math

import torch

from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.backends.torch_reference.table import RULES


def inverse_frequencies(*, head_dim, theta, rope_type, factor, low_freq_factor, high_freq_factor, original):
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).to(dtype=torch.float) / head_dim))
    if rope_type == "linear":
        return inv_freq / factor
    if rope_type == "llama3":
        low_wavelen, high_wavelen = original / low_freq_factor, original / high_freq_factor
        wavelen = 2 * math.pi / inv_freq
        scaled = torch.where(wavelen > low_wavelen, inv_freq / factor, inv_freq)
        smooth = (original / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor)
        smoothed = (1 - smooth) * scaled / factor + smooth * scaled
        medium = ~(wavelen < high_wavelen) * ~(wavelen > low_wavelen)
        return torch.where(medium, smoothed, scaled)
    return inv_freq


@RULES.rule("rope_tables")
def rope_tables(
    position_ids,
    *,
    head_dim,
    theta,
    dtype,
    rope_type,
    factor,
    low_freq_factor,
    high_freq_factor,
    original_max_position_embeddings,
):
    inv_freq = inverse_frequencies(
        head_dim=head_dim,
        theta=theta,
        rope_type=rope_type,
        factor=factor,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original=original_max_position_embeddings,
    ).to(position_ids.device)
    freqs = position_ids[..., None].float() * inv_freq
    emb = torch.cat((freqs, freqs), dim=-1)
    return emb.cos().to(DTYPES[dtype]).unsqueeze(1), emb.sin().to(DTYPES[dtype]).unsqueeze(1)


@RULES.rule("rotate_half")
def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


@RULES.rule("rotate_half_bwd")
def rotate_half_bwd(dy):
    half = dy.shape[-1] // 2
    return torch.cat((dy[..., half:], -dy[..., :half]), dim=-1)
