"""glu on Triton: rules over `kernels/glu.py`. Formulas there."""

from __future__ import annotations

from torch import Tensor

from smedjan.backends.cuda_triton.activation import CURVES
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import glu as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows


def _flat(*tensors: Tensor) -> list[Tensor]:
    """Views [rows, width] for one launch: a single row if all are contiguous, else rows as they lie."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]


@RULES.kernel("glu", label="triton glu", inplace=((0, 0), (0, 1)))
def glu(run: Launches, ins: tuple, outs: tuple, *, act: str) -> None:
    """gate, up [..., F] -> act(gate) * up [..., F]. The two may be halves of one [..., 2F] projection."""
    gate, up = ins
    (y,) = outs
    if gate.numel() == 0:
        return
    gate, up, y = _flat(gate, up, y)
    rows, width = gate.shape
    tile = common.flat_tile()
    blocks = common.cdiv(width, tile.cols)
    strides = (gate.stride(0), up.stride(0), y.stride(0))
    run.kernel(
        kernels.glu_fwd,
        (rows * blocks,),
        gate,
        up,
        y,
        *strides,
        width,
        blocks,
        ACT=CURVES[act],
        COLS=tile.cols,
        **tile.options,
    )


@RULES.kernel("glu_bwd", label="triton glu_bwd", inplace=lambda node: _over(node.attrs["needs"]), strided=True)
def glu_bwd(run: Launches, ins: tuple, outs: tuple, *, needs: tuple[bool, bool], act: str) -> None:
    """gate, up, dy [..., F] -> dgate, dup [..., F], those of them that are needed."""
    gate, up, dy = ins
    if gate.numel() == 0:
        return
    found = iter(outs)
    dgate, dup = (next(found) if need else None for need in needs)
    given = [tensor for tensor in (gate, up, dy, dgate, dup) if tensor is not None]
    flat = iter(_flat(*given))
    gate, up, dy = next(flat), next(flat), next(flat)
    dgate, dup = (None if tensor is None else next(flat) for tensor in (dgate, dup))
    rows, width = gate.shape
    tile = common.flat_tile()
    blocks = common.cdiv(width, tile.cols)
    strides = (tensor.stride(0) if tensor is not None else 0 for tensor in (gate, up, dy, dgate, dup))
    run.kernel(
        kernels.glu_bwd,
        (rows * blocks,),
        gate,
        up,
        dy,
        dgate,
        dup,
        *strides,
        width,
        blocks,
        ACT=CURVES[act],
        COLS=tile.cols,
        **tile.options,
    )


def _over(needs: tuple[bool, bool]) -> tuple[tuple[int, int], ...]:
    """dgate over gate and dup over up, or either over dy."""
    both = ((0, 0), (1, 1), (0, 2), (1, 2))
    return both if all(needs) else ((0, 0), (0, 1), (0, 2))
