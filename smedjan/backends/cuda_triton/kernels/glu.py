"""glu: a gated MLP's unit, forward and backward.

    y     = act(gate) * up
    dup   = dy * act(gate)
    dgate = dy * up * act'(gate)

    silu        g s,  s = 1 / (1 + exp(-g));                slope s (1 + g (1 - s))
    gelu        g P,  P = (1 + erf(g / sqrt 2)) / 2;        slope P + g exp(-g^2 / 2) / sqrt(2 pi)
    gelu_tanh   g s,  s = 1 / (1 + exp(-2u)) = (1 + tanh u) / 2,  u = sqrt(2 / pi) (g + 0.044715 g^3);
                slope s + g s (1 - s) 2 u'
    relu        max(g, 0);                                  slope 1 where g > 0
    relu2       max(g, 0)^2;                                slope 2 max(g, 0)

gate, up, y, ... [rows, width], each with its own stride between rows, so that both may be halves of one stacked
projection. act(gate) is float32 inside and rounded to gate's dtype before it meets `up`, as in torch's
`act_fn(gate) * up`: that rounding is part of the forward value, and of no gradient.

Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_2_PI = tl.constexpr(0.7978845608028654)
"""sqrt(1 / 2) and sqrt(2 / pi)."""


@triton.jit
def _share(g, ACT: tl.constexpr):
    """What act(g) is g's share of: act(g) = g * _share(g)."""
    if ACT == "silu":
        return 1.0 / (1.0 + tl.exp(-g))
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(g * ROOT_HALF))
    elif ACT == "gelu_tanh":
        return 1.0 / (1.0 + tl.exp((g + 0.044715 * g * g * g) * (-2.0 * ROOT_2_PI)))
    elif ACT == "relu":
        return tl.where(g > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        return tl.maximum(g, 0.0)


@triton.jit
def _slope(g, share, ACT: tl.constexpr):
    """d act(g) / dg"""
    if ACT == "silu":
        return share * (1.0 + g * (1.0 - share))
    elif ACT == "gelu":
        return share + g * (0.5 * ROOT_2_PI) * tl.exp(-0.5 * g * g)
    elif ACT == "gelu_tanh":
        # s (1 - s) of the nearer tail: 1 - s would cancel where s is almost 1, and u' is largest.
        decay = tl.exp(tl.abs(g + 0.044715 * g * g * g) * (-2.0 * ROOT_2_PI))
        bell = decay / ((1.0 + decay) * (1.0 + decay))
        return share + g * bell * (2.0 * ROOT_2_PI) * (1.0 + 3.0 * 0.044715 * g * g)
    elif ACT == "relu":
        return share
    else:
        tl.static_assert(ACT == "relu2")
        return 2.0 * share


@triton.jit(do_not_specialize=["blocks"])
def glu_fwd(gate, up, y, gate_stride, up_stride, width, blocks, ACT: tl.constexpr, COLS: tl.constexpr):
    """COLS values of one row; program = row * blocks + block."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = col < width
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    act = narrow(g * _share(g, ACT), gate.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + col, narrow(act * u, y.dtype.element_ty), mask=inside)


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
    share = _share(g, ACT)
    if dup is not None:
        tl.store(dup + row * width + col, narrow(grad * g * share, dup.dtype.element_ty), mask=inside)
    if dgate is not None:
        u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
        out = grad * u * _slope(g, share, ACT)
        tl.store(dgate + row * width + col, narrow(out, dgate.dtype.element_ty), mask=inside)
