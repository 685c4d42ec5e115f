"""Weights of 4 bits widened into their place, a chunk at a time: what lies between stays in the cache, and is small."""

from __future__ import annotations

from torch import Tensor

from smedjan.backends.cpu_native.table import PLANNED
from smedjan.backends.planned.launch import Launches
from smedjan.backends.torch_reference.quantized import tables
from smedjan.checkpoint import nf4

CHUNK = 1 << 15
"""Codes, of two values each: whole blocks. Their indices and values take 0.6 MB."""

LABEL = "aten, in chunks"


def _temporaries(node) -> int:
    """Of a chunk, the indices in int32 and int64 and the values; the scales and what they are made of."""
    codes, absmax = node.inputs[:2]
    return 20 * min(CHUNK, codes.numel) + 20 * absmax.numel


def _widen(codes: Tensor, absmax: Tensor, nested: Tensor, offset: Tensor, out: Tensor) -> None:
    """The exact backend's operations, value for value."""
    pairs, dynamic = tables(codes.device)
    scale = dynamic[absmax.int()] * nested.repeat_interleave(nf4.NESTED_BLOCK)[: len(absmax)] + offset
    flat, blocks = out.view(-1), 2 * CHUNK // nf4.BLOCK
    for number, part in enumerate(codes.split(CHUNK)):
        place = flat[2 * CHUNK * number :][: 2 * CHUNK]
        values = pairs[part.int()].view(-1)[: len(place)]
        scales = scale[blocks * number :][:blocks]
        whole = len(values) // nf4.BLOCK * nf4.BLOCK
        values[:whole].view(-1, nf4.BLOCK).mul_(scales[: whole // nf4.BLOCK, None])
        values[whole:].mul_(scales[-1])
        place.copy_(values)


@PLANNED.kernel("nf4_dequantize", label=LABEL, temporaries=_temporaries)
def nf4_dequantize(run: Launches, ins: tuple, outs: tuple, *, shape: tuple[int, int], dtype: str) -> None:
    run.library(LABEL, _widen, *ins, outs[0])
