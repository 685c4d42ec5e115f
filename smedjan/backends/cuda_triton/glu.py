"""glu on Triton: launchers of `kernels/glu.py`. Formulas there."""

from __future__ import annotations

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import glu as kernels
from smedjan.backends.cuda_triton.norm import as_rows

ACTIVATIONS = ("silu",)
"""What `act` may be: the rule's `supports=`."""


def _flat(*tensors: Tensor) -> list[Tensor]:
    """Views [rows, width] for one launch: a single row if all are contiguous, else rows as they lie."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]


def glu(gate: Tensor, up: Tensor, *, act: str = "silu") -> Tensor:
    """gate, up [..., F] -> act(gate) * up [..., F]. The two may be halves of one [..., 2F] projection."""
    assert act in ACTIVATIONS, f"no Triton kernel for act {act!r}"
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
        gate2, up2, y, gate2.stride(0), up2.stride(0), width, blocks, COLS=tile.cols, **tile.options
    )
    return y


def glu_bwd(
    gate: Tensor, up: Tensor, dy: Tensor, *, needs: tuple[bool, bool], act: str = "silu"
) -> tuple[Tensor | None, Tensor | None]:
    """gate, up, dy [..., F] -> dgate, dup [..., F]; None if not needed."""
    assert act in ACTIVATIONS, f"no Triton kernel for act {act!r}"
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
        COLS=tile.cols,
        **tile.options,
    )
    return dgate, dup
