"""glu: a gated MLP's unit, forward and backward.

    y     = act(gate) * up
    dup   = dy * act(gate)
    dgate = dy * up * act'(gate)

The activations and their slopes are those of `kernels/activation.py`.

gate, up, y, ... [rows, width], each with its own stride between rows, so that both may be halves of one stacked
projection. act(gate) is float32 inside and rounded to gate's dtype before it meets `up`, as in torch's
`act_fn(gate) * up`: that rounding is part of the forward value, and of no gradient.

Shazeer, "GLU Variants Improve Transformer", 2020.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.activation import share_of, slope_of
from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit(do_not_specialize=["blocks"])
def glu_fwd(gate, up, y, gate_stride, up_stride, y_stride, width, blocks, ACT: tl.constexpr, COLS: tl.constexpr):
    """COLS values of one row; program = row * blocks + block."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = col < width
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    act = narrow(g * share_of(g, ACT), gate.dtype.element_ty).to(tl.float32)
    tl.store(y + row * y_stride + col, narrow(act * u, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def glu_bwd(
    gate,
    up,
    dy,
    dgate,
    dup,
    gate_stride,
    up_stride,
    dy_stride,
    dgate_stride,
    dup_stride,
    width,
    blocks,
    ACT: tl.constexpr,
    COLS: tl.constexpr,
):
    """dgate and dup of COLS values of one row; either may be None: not wanted."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = col < width
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
    share = share_of(g, ACT)
    # Every value is read before one is written: the gradients may take the places of gate, up or dy.
    if dgate is not None:
        u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    if dup is not None:
        tl.store(dup + row * dup_stride + col, narrow(grad * g * share, dup.dtype.element_ty), mask=inside)
    if dgate is not None:
        out = grad * u * slope_of(g, share, ACT)
        tl.store(dgate + row * dgate_stride + col, narrow(out, dgate.dtype.element_ty), mask=inside)
