"""Attention by cuDNN and by torch's own FlashAttention-2, for the shape classes where `tuned.json` says that they are
the best there is ("attention_choice"). Nothing has been measured so far, and Triton's kernels run everywhere.

They do plain causal attention: no mask, documents, sinks, window or cap, as many queries as keys, 16-bit arrays; groups
of query heads as they are. Everything else is Triton's rule in the table, and the plan's labels say which ran. Forward
and backward are of one library, since both rules ask the same of the same arrays: what they share is y and lse, the
natural logarithm in float32.

Unlike cuBLAS they give arrays of their own, which are copied into the planned ones. What they allocate on the way comes
from torch's pool, that of the CUDA graph while it is captured: a replay allocates nothing. Their backward passes add dq
atomically: two runs differ in the last bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cuda_triton import tuned
from smedjan.backends.cuda_triton.attention import INSIDE, shape_class_of
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.graph.lowering import Supports
from smedjan.graph.node import Node

CUDNN, FLASH = "cudnn", "flash"
CAUSAL = {"dropout_p": 0.0, "is_causal": True}


def _does(library: str, dim: int) -> bool:
    """Head dims that a library does forward and backward on every architecture from sm_80 on (`sdp_utils.cpp`)."""
    return dim % 8 == 0 and (dim <= 128 if library == CUDNN else dim <= 192 or dim == 256)


def _chosen(library: str) -> Supports:
    def supports(node: Node) -> bool:
        given = dict(zip(node.op.parameters, node.inputs, strict=False))
        q, k = given["q"], given["k"]
        assert q is not None
        assert k is not None
        plain = node.attrs["causal"] and not node.attrs["window"] and not node.attrs["cap"]
        plain = plain and all(given[name] is None for name in ("key_mask", "start", "end", "sinks"))
        # cuDNN has no attention over one key.
        square = q.shape[2] == k.shape[2] > 1 and q.numel > 0
        able = plain and square and q.dtype in ("bfloat16", "float16") and _does(library, q.shape[3])
        return able and tuned.library("attention", f"causal {shape_class_of(q.shape[3], q.dtype)}") == library

    return supports


def flash_forward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor | None, *, scale: float) -> None:
    made = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, **CAUSAL, scale=scale)
    y.copy_(made[0])
    if lse is not None:
        lse.copy_(made[1])


def flash_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, *outs: Tensor | None, scale: float
) -> None:
    made = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(dy, q, k, v, y, lse),
        cum_seq_q=None,
        cum_seq_k=None,
        max_q=q.shape[2],
        max_k=k.shape[2],
        philox_seed=q.new_empty(2, dtype=torch.uint64),
        philox_offset=q.new_empty((), dtype=torch.uint64),
        **CAUSAL,
        scale=scale,
    )
    _copy(made, outs)


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor | None, *, scale: float) -> None:
    made = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(q, k, v), attn_bias=None, compute_log_sumexp=lse is not None, **CAUSAL, scale=scale
    )
    y.copy_(made[0])
    if lse is not None:
        lse.copy_(made[1].squeeze(-1))


def cudnn_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, *outs: Tensor | None, scale: float
) -> None:
    made = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_like(q, dy), q, k, v, _like(q, y), lse.unsqueeze(-1)),
        philox_seed=q.new_empty((), dtype=torch.int64),
        philox_offset=q.new_empty((), dtype=torch.int64),
        attn_bias=None,
        cum_seq_q=None,
        cum_seq_k=None,
        max_q=q.shape[2],
        max_k=k.shape[2],
        **CAUSAL,
        scale=scale,
    )
    _copy(made, outs)


def _like(q: Tensor, x: Tensor) -> Tensor:
    """x as cuDNN's forward would have laid it out. torch keeps a plan of the backward for the strides of q, k and v
    alone, and would run the one of another y's strides (`MHACacheKeyWrapper`)."""
    laid_out = torch.empty_like(q)
    return x if x.stride() == laid_out.stride() else laid_out.copy_(x)


def _copy(made: tuple[Tensor, ...], outs: tuple[Tensor | None, ...]) -> None:
    for found, out in zip(made, outs, strict=True):
        if out is not None:
            out.copy_(found)


def _register(library: str, name: str, forward: Any, backward: Any) -> None:
    @RULES.kernel("flash_attention", label=name, supports=_chosen(library), order={0: INSIDE}, strided=True)
    def flash_attention(run: Launches, ins: tuple, outs: tuple, *, scale: float, **_: Any) -> None:
        run.library(name, forward, *ins[:3], *outs, scale=scale)

    @RULES.kernel(
        "flash_attention_bwd",
        label=f"{name} backward",
        supports=_chosen(library),
        order={0: INSIDE, 1: INSIDE, 2: INSIDE},
        strided=True,
    )
    def flash_attention_bwd(run: Launches, ins: tuple, outs: tuple, *, scale: float, **_: Any) -> None:
        dy, q, k, v, *_masks, y, lse = ins
        run.library(f"{name} backward", backward, dy, q, k, v, y, lse, *outs, scale=scale)


_register(FLASH, "aten attention flash", flash_forward, flash_backward)
_register(CUDNN, "cudnn attention", cudnn_forward, cudnn_backward)
