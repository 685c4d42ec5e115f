"""Rotary tables with transformers' float32 arithmetic (modeling_rope_utils), and the rotation."""

from __future__ import annotations

import math

import torch

from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.backends.torch_reference.table import RULES


def inverse_frequencies(rope, head_dim, seq_len):
    """f_i of `rope` [D / 2], float32. `seq_len`: the largest position and one, an int64 scalar tensor."""
    dim = rope.rotary_dim(head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    if rope.rope_type == "dynamic" and seq_len > rope.max_position_embeddings:
        return 1.0 / (_dynamic_theta(rope, dim, seq_len) ** exponents)
    if rope.rope_type == "dynamic":
        return 1.0 / (_dynamic_theta(rope, dim, rope.max_position_embeddings) ** exponents)
    if rope.rope_type == "longrope":
        factors = rope.long_factor if seq_len > rope.original_max_position_embeddings else rope.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.rope_theta**exponents)
    if rope.rope_type == "yarn":
        return _yarn(rope, dim, exponents)
    inv_freq = 1.0 / (rope.rope_theta**exponents)
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    return _llama3(rope, inv_freq) if rope.rope_type == "llama3" else inv_freq


def _dynamic_theta(rope, dim, seq_len):
    stretch = (rope.factor * seq_len / rope.max_position_embeddings) - (rope.factor - 1)
    return rope.rope_theta * stretch ** (dim / (dim - 2))


def _llama3(rope, inv_freq):
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    low_wavelen, high_wavelen = original / low, original / high
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > low_wavelen, inv_freq / rope.factor, inv_freq)
    smooth = (original / wavelen - low) / (high - low)
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    medium = ~(wavelen < high_wavelen) * ~(wavelen > low_wavelen)
    return torch.where(medium, smoothed, scaled)


def _yarn(rope, dim, exponents):
    theta, original = rope.rope_theta, rope.original_max_position_embeddings

    def place(turns):
        """The (fractional) pair that turns so often within the original length."""
        return (dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(theta))

    low, high = place(rope.beta_fast or 32), place(rope.beta_slow or 1)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    powers = theta**exponents
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


@RULES.rule("rope_tables")
def rope_tables(position_ids, *, rope, head_dim, dtype, interleaved):
    inv_freq = inverse_frequencies(rope, head_dim, position_ids.max() + 1).to(position_ids.device)
    freqs = position_ids[..., None].float() * inv_freq
    emb = torch.repeat_interleave(freqs, 2, dim=-1) if interleaved else torch.cat((freqs, freqs), dim=-1)
    cos, sin = emb.cos() * rope.attention_scaling, emb.sin() * rope.attention_scaling
    return cos.to(DTYPES[dtype]).unsqueeze(1), sin.to(DTYPES[dtype]).unsqueeze(1)


@RULES.rule("rotate_half")
def rotate_half(x, *, interleaved):
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


@RULES.rule("rotate_half_bwd")
def rotate_half_bwd(dy, *, interleaved):
    if interleaved:
        return torch.stack([dy[..., 1::2], -dy[..., ::2]], dim=-1).flatten(-2)
    half = dy.shape[-1] // 2
    return torch.cat((dy[..., half:], -dy[..., :half]), dim=-1)
