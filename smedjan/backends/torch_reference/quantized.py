"""Weights of few bits: NF4 and int8 widened in float32 and rounded once, as bitsandbytes' CPU build does it; MLX's
format as its CPU build widens it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.backends.torch_reference.table import RULES
from smedjan.checkpoint import nf4


@lru_cache(maxsize=8)
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of a byte's two codes, [256, 2], and of a scale's code, [256], brought to the device once."""
    byte = torch.arange(256)
    pairs = torch.from_numpy(nf4.NORMAL)[torch.stack((byte >> 4, byte & 15), dim=-1)]
    return pairs.to(device), torch.from_numpy(nf4.DYNAMIC.copy()).to(device)


def _widened(node):
    """Where bytes are looked up: an index in int32 and in int64 of each, its two float32 values, and the scales."""
    (out,) = node.outputs
    return 10 * out.numel + 4 * node.inputs[1].numel - out.nbytes


@RULES.rule("nf4_dequantize", temporaries=_widened)
def nf4_dequantize(codes, absmax, nested, offset, *, shape, dtype):
    pairs, dynamic = tables(codes.device)
    scale = dynamic[absmax.int()] * nested.repeat_interleave(nf4.NESTED_BLOCK)[: len(absmax)] + offset
    values = pairs[codes.int()].view(-1)[: shape[0] * shape[1]]
    whole = values.numel() // nf4.BLOCK * nf4.BLOCK
    values[:whole].view(-1, nf4.BLOCK).mul_(scale[: whole // nf4.BLOCK, None])
    values[whole:].mul_(scale[-1])
    return values.view(shape).to(DTYPES[dtype])


@RULES.rule("nf4_quantize")
def nf4_quantize(weight):
    values = weight.float().view(-1)
    whole = values.numel() // nf4.BLOCK * nf4.BLOCK
    blocks, last = values[:whole].view(-1, nf4.BLOCK), values[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=float(nf4.TINIEST)))[:, None]).view(-1)
    if last.numel():
        scale = last.abs().amax().clamp(min=float(nf4.TINIEST))
        absmax, scaled = torch.cat((absmax, scale[None])), torch.cat((scaled, last / scale))
    scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
    codes = torch.bucketize(scaled, torch.from_numpy(nf4.BOUNDS).to(scaled.device)).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


@RULES.rule("int8_quantize")
def int8_quantize(weight):
    values = weight.float()
    scale = values.abs().amax(1) / 127
    codes = values / torch.where(scale == 0, 1.0, scale)[:, None]
    return codes.round().clamp(-127, 127).to(torch.int8), scale


@RULES.rule("int8_dequantize", temporaries=lambda node: 8 * node.outputs[0].numel - node.outputs[0].nbytes)
def int8_dequantize(codes, scale, *, dtype):
    return (codes.float() * scale[:, None]).to(DTYPES[dtype])


def _unpacked(node):
    """Codes as integers, and the bytes that each few of them are taken from as one word."""
    out, bits = node.outputs[0], node.attrs["bits"]
    return (8 if bits == 5 else 4) * out.numel * (1 + bits) // bits


@RULES.rule("affine_dequantize", temporaries=_unpacked)
def affine_dequantize(codes, scales, biases, *, bits, group_size):
    # Codes that fill whole bytes: 8 of 3 or 5 bits, 4 of 6, or those of one byte.
    count, width = {3: (8, 3), 5: (8, 5), 6: (4, 3)}.get(bits, (8 // bits, 1))
    dtype = torch.int64 if bits == 5 else torch.int32
    packed = codes.view(torch.uint8).view(-1, width)
    words = packed[:, 0].to(dtype)
    for byte in range(1, width):
        words |= packed[:, byte].to(dtype) << 8 * byte
    shifts = torch.arange(0, count * bits, bits, dtype=dtype, device=codes.device)
    values = (words[:, None] >> shifts).bitwise_and_((1 << bits) - 1).to(scales.dtype)
    grouped = values.view(*scales.shape, group_size)
    return grouped.mul_(scales[..., None]).add_(biases[..., None]).view(scales.shape[0], -1)


@RULES.rule("affine_embedding", temporaries=lambda node: 8 * node.outputs[0].numel)
def affine_embedding(input_ids, codes, scales, biases, *, bits, group_size):
    ids = input_ids.reshape(-1)
    # index_select knows no uint32.
    rows = (codes.view(torch.int32)[ids].view(torch.uint32), scales[ids], biases[ids])
    return affine_dequantize(*rows, bits=bits, group_size=group_size).view(*input_ids.shape, -1)
