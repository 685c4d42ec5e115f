"""glu: the gated unit of a Llama MLP, forward and backward.

    y     = silu(gate) * up,        silu(g) = g * s,  s = 1 / (1 + exp(-g))
    dup   = dy * silu(gate)
    dgate = dy * up * s * (1 + g * (1 - s))

gate, up, y, ... [rows, width], each with its own stride between rows, so that both may be halves of one stacked
projection. silu(gate) is float32 inside and rounded to gate's dtype before it meets `up`, as in torch's
`act_fn(gate) * up`: that rounding is part of the forward value, and of no gradient.

Shazeer, "GLU Variants Improve Transformer", 2020.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit(do_not_specialize=["blocks"])
def glu_fwd(gate, up, y, gate_stride, up_stride, width, blocks, COLS: tl.constexpr):
    """COLS values of one row; program = row * blocks + block."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = col < width
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    silu = narrow(g / (1.0 + tl.exp(-g)), gate.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + col, narrow(silu * u, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def glu_bwd(gate, up, dy, dgate, dup, gate_stride, up_stride, dy_stride, width, blocks, COLS: tl.constexpr):
    """dgate and dup of COLS values of one row; either may be None: not wanted."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = col < width
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    if dup is not None:
        tl.store(dup + row * width + col, narrow(grad * g * sigmoid, dup.dtype.element_ty), mask=inside)
    if dgate is not None:
        u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
        out = grad * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
        tl.store(dgate + row * width + col, narrow(out, dgate.dtype.element_ty), mask=inside)
