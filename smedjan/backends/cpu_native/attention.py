"""Attention of plans by compiled kernels: tiles of scores, forward and backward (native/src/attention_rows.c).

Where there are none, aten's CPU flash attention, called once forward and once backward; it takes grouped heads and
masks as they are, but caps no scores: with a softcap, attention runs decomposed there. Which dtype transformers takes
for the softmax is a rounding point that only an exact backend reproduces.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from smedjan.backends.cpu_native import amx, native
from smedjan.backends.cpu_native.native.team import call, step, threads
from smedjan.backends.cpu_native.table import PLANNED, RULES, compiled
from smedjan.backends.planned.launch import Launches
from smedjan.backends.torch_reference import attention as aten
from smedjan.graph.lowering import Bytes
from smedjan.graph.node import Node

LABEL = "aten flash attention (CPU)"


def uncapped(node):
    return not node.attrs["cap"]


@RULES.rule("attention", label=LABEL, supports=uncapped)
def attention(q, k, v, mask, *, causal, scale, implementation, cap, softmax_dtype):
    if q.shape[2] == 1:
        return aten.sdpa_decode(q, k, v, mask, causal=False, scale=scale)
    return aten.sdpa(q, k, v, mask, causal=causal, scale=scale)


@RULES.rule("attention_bwd", label=LABEL, supports=uncapped)
def attention_bwd(dy, q, k, v, mask, y, lse, *, causal, scale, implementation, cap, softmax_dtype):
    return aten.sdpa_bwd(dy, q, k, v, mask, y, lse, causal=causal, scale=scale)


# Of plans: aten's results, which it allocates, go to their places. Heads lie inside there, as projections read them.

INSIDE = (0, 2, 1, 3)


def _several(node):
    return uncapped(node) and node.inputs[0].shape[2] > 1


def _forward(q, k, v, mask, y, lse, causal, scale) -> None:
    made, sums = aten.sdpa(q, k, v, mask, causal=causal, scale=scale)
    y.copy_(made)
    if lse is not None:
        lse.copy_(sums)


def backward(dy, q, k, v, mask, y, lse, outs: tuple[Tensor | None, ...], causal, scale) -> None:
    made = aten.sdpa_bwd(dy, q, k, v, mask, y, lse, causal=causal, scale=scale)
    for array, out in zip(made, outs, strict=True):
        if out is not None:
            out.copy_(array)


def _made(besides: Bytes) -> Bytes:
    """aten's results, until they are copied, and what it takes besides."""
    return lambda node: sum(tensor.nbytes for tensor in node.outputs) + besides(node)


@PLANNED.kernel("attention", label=LABEL, supports=_several, order={0: INSIDE}, temporaries=_made(aten.forward_bytes))
def planned_attention(run: Launches, ins: tuple, outs: tuple, *, causal: bool, scale: float, **_: object) -> None:
    y, lse = outs
    y = run.scratch(tuple(ins[0].shape), ins[0].dtype) if y is None else y
    run.library(LABEL, _forward, *ins, y, lse, causal, scale)


@PLANNED.kernel(
    "attention_bwd",
    label=LABEL,
    supports=uncapped,
    order=dict.fromkeys(range(3), INSIDE),
    strided=True,
    temporaries=_made(aten.backward_bytes),
)
def planned_attention_bwd(run: Launches, ins: tuple, outs: tuple, *, causal: bool, scale: float, **_: object) -> None:
    run.library(LABEL, backward, *ins, outs, causal, scale)


# Compiled kernels, which write results to their places, and sum in float32 whatever the dtype.

NATIVE = "native attention"
TILE = 64
"""Of src/attention_tiles.h."""
IDLE = 2 / 7
"""The most of all threads' time that may pass without work, before the backward pass is split finer than key heads:
that computes scores twice, seven products in the place of five."""

LONG = 512
"""Tokens from which aten's forward pass in bfloat16, whose products oneDNN takes to AMX, is faster than float32 tiles:
0.8 of their time at 512 tokens, 0.5 at 2,048; the backward pass is not (bench/attention.py, 2026-11-29)."""


def _tiled(node: Node) -> bool:
    """`node` begins with `attention`'s operands, or with dy and these."""
    q, k, v, mask = node.inputs[1:5] if node.op.name == "attention_bwd" else node.inputs
    assert q is not None
    assert k is not None
    assert v is not None
    kinds = {tensor.dtype for tensor in (q, k, v)}
    return compiled(node) and len(kinds) == 1 and k.shape == v.shape and (mask is None or mask.dtype == "bool")


@cache
def _floats(dim: int, totals: int) -> int:
    count = native.library().smedjan_attention_floats
    count.argtypes, count.restype = (ctypes.c_int64, ctypes.c_int64), ctypes.c_int64
    return count(dim, totals)


def _scratch(run: Launches, dim: int, totals: int) -> tuple[Tensor, int]:
    """All threads' scratch, and the floats of one's; `totals` as `smedjan_attention_floats` has it."""
    floats = _floats(dim, totals)
    return run.scratch((threads() * floats + 16,), torch.float32), floats


def _strides(q: Tensor, keys: int, mask: Tensor | None, arrays: tuple[Tensor | None, ...]) -> Tensor:
    """The outer three of each array's four strides; a mask's of what it is broadcast to. Of `lse`, all its three."""
    shape = (*q.shape[:3], keys)
    found = []
    for array in (*arrays[:3], None if mask is None else mask.expand(shape), *arrays[3:]):
        assert array is None or array.ndim == 3 or array.shape[3] == 1 or array.stride(3) == 1, "rows not contiguous"
        found.append((0, 0, 0) if array is None else array.stride()[:3])
    return torch.tensor(found, dtype=torch.int64)


def _sizes(q: Tensor, k: Tensor, causal: bool) -> tuple[int, ...]:
    batch, heads, queries, dim = q.shape
    return batch, heads, k.shape[1], queries, k.shape[2], dim, int(causal), int(q.dtype == torch.bfloat16)


def _tiled_forward(node: Node) -> bool:
    q = node.inputs[0]
    assert q is not None
    long = q.dtype == "bfloat16" and q.shape[2] >= LONG and not node.attrs["cap"] and amx.available()
    return _tiled(node) and not long


@PLANNED.kernel("attention", label=NATIVE, supports=_tiled_forward, order={0: INSIDE})
def native_attention(
    run: Launches, ins: tuple, outs: tuple, *, causal: bool, scale: float, cap: float, **_: object
) -> None:
    q, k, v, mask = ins
    y, lse = outs
    scratch, floats = _scratch(run, q.shape[3], 0)
    strides = _strides(q, k.shape[2], mask, (q, k, v, y, lse))
    numbers = (*_sizes(q, k, causal), floats)
    call(run, "attention", step("attention", (q, k, v, mask, y, lse, scratch, strides), numbers, (scale, cap)))


def split(units: int, threads: int) -> bool:
    """Whether so many key heads leave too much of so many threads idle, all being of one size."""
    rounds = -(-units // threads)
    return units < (1 - IDLE) * rounds * threads


@PLANNED.kernel("attention_bwd", label=NATIVE, supports=_tiled, order=dict.fromkeys(range(3), INSIDE), strided=True)
def native_attention_bwd(
    run: Launches, ins: tuple, outs: tuple, *, causal: bool, scale: float, cap: float, **_: object
) -> None:
    dy, q, k, v, mask, y, lse = ins
    finer = split(k.shape[0] * k.shape[1], threads())
    totals = TILE if finer else -(-k.shape[2] // TILE) * TILE
    scratch, floats = _scratch(run, q.shape[3], totals)
    strides = _strides(q, k.shape[2], mask, (q, k, v, y, lse, dy, *outs))
    numbers = (*_sizes(q, k, causal), floats, int(finer))
    arrays = (q, k, v, mask, y, lse, scratch, strides, dy, *outs)
    call(run, "attention_bwd", step("attention_bwd", arrays, numbers, (scale, cap)))
