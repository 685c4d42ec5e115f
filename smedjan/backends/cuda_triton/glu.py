"""glu on Triton: launchers of `kernels/glu.py`. Formulas there."""

from __future__ import annotations

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import glu as kernels
from smedjan.backends.cuda_triton.norm import as_rows

CURVES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""The kernels' name for each name in `hidden_act`."""


def _flat(*tensors: Tensor) -> list[Tensor]:
    """Views [rows, width] for one launch: a single row if all are contiguous, else rows as they lie."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]


def glu(gate: Tensor, up: Tensor, *, act: str = "silu") -> Tensor:
    """gate, up [..., F] -> act(gate) * up [..., F]. The two may be halves of one [..., 2F] projection."""
    assert gate.shape == up.shape
    assert gate.dtype == up.dtype
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return y
    gate2, up2 = _flat(gate, up)
    rows, width = gate2.shape
    tile = common.flat_tile()
    blocks = common.cdiv(width, tile.cols)
    kernels.glu_fwd[(rows * blocks,)](
        gate2, up2, y, gate2.stride(0), up2.stride(0), width, blocks, ACT=CURVES[act], COLS=tile.cols, **tile.options
    )
    return y


def glu_bwd(
    gate: Tensor, up: Tensor, dy: Tensor, *, needs: tuple[bool, bool], act: str = "silu"
) -> tuple[Tensor | None, Tensor | None]:
    """gate, up, dy [..., F] -> dgate, dup [..., F]; None if not needed."""
    assert any(needs), "a backward op that nothing needs"
    assert gate.shape == up.shape == dy.shape
    assert gate.dtype == up.dtype
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if need else None for need in needs)
    if gate.numel() == 0:
        return dgate, dup
    gate2, up2, dy2 = _flat(gate, up, dy)
    rows, width = gate2.shape
    tile = common.flat_tile()
    blocks = common.cdiv(width, tile.cols)
    kernels.glu_bwd[(rows * blocks,)](
        gate2,
        up2,
        dy2,
        dgate,
        dup,
        gate2.stride(0),
        up2.stride(0),
        dy2.stride(0),
        width,
        blocks,
        ACT=CURVES[act],
        COLS=tile.cols,
        **tile.options,
    )
    return dgate, dup
