"""Attention on Triton: rules over `kernels/attention.py` and `kernels/attention_bwd.py`. Formulas there.

`library_attention.py` has rules of the same ops for cuDNN and for torch's own.
"""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from smedjan.backends.cuda_triton import tuned
from smedjan.backends.cuda_triton.kernels import attention as kernels
from smedjan.backends.cuda_triton.kernels import attention_bwd as backward
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.torch_reference.elementwise import DTYPES, NAMES
from smedjan.graph.node import Node
from smedjan.ops import flash  # noqa: F401  (declares the ops)

LOG2_E = log2(2.718281828459045)

HEAD_DIMS = (64, 80, 96, 128, 256)
"""The classes of tuned launch shapes; a head dim between two takes the larger one's."""

INSIDE = (0, 2, 1, 3)
"""[B, H, T, D] as memory has it: [B, T, H, D], so that heads are merged by a view."""

ROW_TILE = common.Tile(rows=32, cols=0, num_warps=4)
SINK_BLOCK = 1024
BOUNDS_SPAN, BOUNDS_BLOCK = 1024, 64


def columns(dim: int) -> tuple[int, int]:
    """A head dim in registers: (HEAD, TAIL), powers of two of at least 16 (a product's smallest), or no tail.

    80 = 64 + 16 and 96 = 64 + 32 spare what 128 would multiply in vain; 112 spares nothing and is 128.
    """
    head = 1 << dim.bit_length() - 1
    tail = max(common.next_power_of_2(dim - head), 16)
    if dim > max(head, 16) and head >= 32 and tail < head:
        return head, tail
    return max(common.next_power_of_2(dim), 16), 0


def shape_class_of(dim: int, dtype: str) -> str:
    """ "128 bf16": a tuned launch shape's name."""
    return f"{next(size for size in HEAD_DIMS if dim <= size)} {tuned.NAMES[DTYPES[dtype]]}"


def shape_class(q: Tensor) -> str:
    return shape_class_of(q.shape[-1], NAMES[q.dtype])


def scalings(scale: float, cap: float) -> tuple[float, float]:
    """(inner, factor) of the kernels: a score times log2(e) is factor s, or factor tanh(inner s)."""
    return (scale / cap, cap * LOG2_E) if cap else (1.0, scale * LOG2_E)


def heads(*tensors: Tensor | None) -> list[int]:
    """The strides of batch, head and token of each, 0 for what is not there."""
    return [stride for tensor in tensors for stride in (tensor.stride()[:3] if tensor is not None else (0, 0, 0))]


def key_passes(q: Tensor, dk: Tensor | None, dv: Tensor | None) -> list[tuple[str, Tensor | None, Tensor | None]]:
    """(tuned kernel, dk, dv) of each launch over the keys: one, or one of each where a program cannot hold both sums.

    [keys, 256] twice in float32 is all that a multiprocessor's registers can hold; the scores are made once more.
    """
    if tuned.has("attention_bwd_kv", shape_class(q)):
        passes = [("attention_bwd_kv", dk, dv)]
    else:
        passes = [("attention_bwd_k", dk, None), ("attention_bwd_v", None, dv)]
    return [one for one in passes if one[1] is not None or one[2] is not None]


def fits(node: Node) -> bool:
    """q is input 0 of the forward op and 1 of the backward: its head dim is one that the kernels hold in registers."""
    q = node.inputs[node.op.parameters.index("q")]
    assert q is not None
    return q.shape[-1] <= HEAD_DIMS[-1] and q.dtype in ("float32", "bfloat16", "float16")


@RULES.kernel("document_bounds", label="triton document_bounds")
def document_bounds(run: Launches, ins: tuple, outs: tuple) -> None:
    """segment_ids [B, T] -> start, end [B, T] int32"""
    (ids,) = ins
    start, end = outs
    batch, seq = ids.shape
    run.kernel(
        kernels.document_bounds,
        (common.cdiv(seq, BOUNDS_BLOCK), batch),
        ids,
        start,
        end,
        ids.stride(0),
        seq,
        SPAN=BOUNDS_SPAN,
        BLOCK=BOUNDS_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


def forward(run: Launches, ins: tuple, outs: tuple, *, scale: float, causal: bool, window: int, cap: float) -> None:
    """Writes down `kernels.attention_fwd`. ins: q, k, v, key_mask, start, end, sinks, length; outs: y, lse."""
    q, k, v = ins[:3]
    y, lse = outs
    batch, query_heads, queries, dim = q.shape
    shape = tuned.options("attention_fwd", shape_class(q))
    head, tail = columns(dim)
    run.kernel(
        kernels.attention_fwd,
        (common.cdiv(queries, shape["BLOCK_M"]), query_heads, batch),
        *ins,
        y,
        lse,
        *heads(q, k, v, y),
        queries,
        k.shape[2],
        *scalings(scale, cap),
        GROUP=query_heads // k.shape[1],
        DIM=dim,
        HEAD=head,
        TAIL=tail,
        CAUSAL=causal,
        WINDOW=window,
        CAPPED=bool(cap),
        **shape,
    )


@RULES.kernel("flash_attention", label="triton attention", supports=fits, order={0: INSIDE}, strided=True)
def flash_attention(
    run: Launches, ins: tuple, outs: tuple, *, scale: float, causal: bool, window: int, cap: float
) -> None:
    """q [B, A, T, D], k, v [B, K, S, D], key_mask, start, end, sinks -> y [B, A, T, D], lse [B, A, T] float32"""
    if ins[0].numel():
        forward(run, (*ins, None), outs, scale=scale, causal=causal, window=window, cap=cap)


@RULES.kernel(
    "flash_attention_bwd",
    label="triton attention_bwd, deterministic",
    supports=fits,
    order={0: INSIDE, 1: INSIDE, 2: INSIDE},
    strided=True,
)
def flash_attention_bwd(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    needs_sinks: bool,
    scale: float,
    causal: bool,
    window: int,
    cap: float,
) -> None:
    """dy [B, A, T, D] and the forward's inputs and outputs -> dq, dk, dv, dsinks where they are needed"""
    dy, q, k, v, key_mask, start, end, sinks, y, lse = ins
    dq, dk, dv, *rest = outs
    batch, query_heads, queries, dim = q.shape
    key_heads, keys = k.shape[1:3]
    t = run.scratch((batch, query_heads, queries), torch.float32)
    run.kernel(
        backward.attention_bwd_rows,
        (common.cdiv(queries, ROW_TILE.rows), query_heads, batch),
        dy,
        y,
        t,
        *heads(dy, y),
        queries,
        DIM=dim,
        COLS=common.next_power_of_2(dim),
        ROWS=ROW_TILE.rows,
        **ROW_TILE.options,
    )
    constants = {
        "GROUP": query_heads // key_heads,
        "DIM": dim,
        **dict(zip(("HEAD", "TAIL"), columns(dim), strict=True)),
        "CAUSAL": causal,
        "WINDOW": window,
        "CAPPED": bool(cap),
    }
    given = (q, k, v, dy, key_mask, start, end, lse, t)
    numbers = (queries, keys, scale, *scalings(scale, cap))
    for kernel, to_k, to_v in key_passes(q, dk, dv):
        # tanh's derivative is one tile more in registers: where that is one too many there is a class for it.
        capped = f"{shape_class(q)} capped"
        shape = tuned.options(kernel, capped if cap and tuned.has(kernel, capped) else shape_class(q))
        run.kernel(
            backward.attention_bwd_kv,
            (common.cdiv(keys, shape["BLOCK_N"]), key_heads, batch),
            *given,
            to_k,
            to_v,
            *heads(q, k, v, dy, to_k, to_v),
            *numbers,
            **constants,
            **shape,
        )
    if dq is not None:
        shape = tuned.options("attention_bwd_q", shape_class(q))
        run.kernel(
            backward.attention_bwd_q,
            (common.cdiv(queries, shape["BLOCK_M"]), query_heads, batch),
            *given,
            dq,
            *heads(q, k, v, dy, dq),
            *numbers,
            **constants,
            **shape,
        )
    if rest and rest[0] is not None:
        run.kernel(
            backward.attention_bwd_sinks,
            (query_heads,),
            sinks,
            lse,
            t,
            rest[0],
            batch,
            queries,
            BLOCK=SINK_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
