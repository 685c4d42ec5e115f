"""Weights of 4 and 8 bits, widened in float32 and rounded once, as bitsandbytes' CPU build does it."""

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
