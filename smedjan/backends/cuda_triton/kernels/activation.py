"""Activations and their gradients; those of a gated unit's gate too (`kernels/glu.py`).

    y  = act(x) = x * share(x);  dx = dy * act'(x)

    silu        x s,  s = 1 / (1 + exp(-x));                slope s (1 + x (1 - s))
    gelu        x P,  P = (1 + erf(x / sqrt 2)) / 2;        slope P + x exp(-x^2 / 2) / sqrt(2 pi)
    gelu_tanh   x s,  s = 1 / (1 + exp(-2u)) = (1 + tanh u) / 2,  u = sqrt(2 / pi) (x + 0.044715 x^3);
                slope s + x s (1 - s) 2 u'
    relu        max(x, 0);                                  slope 1 where x > 0
    relu2       max(x, 0)^2;                                slope 2 max(x, 0)
    tanh        tanh(x);                                    its gradient reads y: `elementwise.binary`

float32 inside, one rounding to the result's dtype. Places and strides are those of `kernels/elementwise.py`.
Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; So et al., "Primer", 2021 (relu2).
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow, tanh
from smedjan.backends.cuda_triton.kernels.elementwise import outer, tile

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_2_PI = tl.constexpr(0.7978845608028654)
"""sqrt(1 / 2) and sqrt(2 / pi)."""


@triton.jit
def share_of(x, ACT: tl.constexpr):
    """What act(x) is x's share of: act(x) = x * share_of(x)."""
    if ACT == "silu":
        return 1.0 / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(x * ROOT_HALF))
    elif ACT == "gelu_tanh":
        return 1.0 / (1.0 + tl.exp((x + 0.044715 * x * x * x) * (-2.0 * ROOT_2_PI)))
    elif ACT == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        return tl.maximum(x, 0.0)


@triton.jit
def slope_of(x, part, ACT: tl.constexpr):
    """d act(x) / dx, part = share_of(x)"""
    if ACT == "silu":
        return part * (1.0 + x * (1.0 - part))
    elif ACT == "gelu":
        return part + x * (0.5 * ROOT_2_PI) * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        # s (1 - s) of the nearer tail: 1 - s would cancel where s is almost 1, and u' is largest.
        decay = tl.exp(tl.abs(x + 0.044715 * x * x * x) * (-2.0 * ROOT_2_PI))
        bell = decay / ((1.0 + decay) * (1.0 + decay))
        return part + x * bell * (2.0 * ROOT_2_PI) * (1.0 + 3.0 * 0.044715 * x * x)
    elif ACT == "relu":
        return part
    else:
        tl.static_assert(ACT == "relu2")
        return 2.0 * part


@triton.jit(do_not_specialize=["rows", "blocks"])
def act_fwd(
    x,
    y,
    x_stride0,
    x_stride1,
    x_stride2,
    x_stride,
    y_stride0,
    y_stride1,
    y_stride2,
    y_stride,
    size1,
    size2,
    rows,
    width,
    blocks,
    ACT: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y = act(x)"""
    row, col, inside = tile(rows, width, blocks, ROWS, COLS)
    source = outer(row, size1, size2, x_stride0, x_stride1, x_stride2, DIMS)[:, None] + (col * x_stride)[None, :]
    target = outer(row, size1, size2, y_stride0, y_stride1, y_stride2, DIMS)[:, None] + (col * y_stride)[None, :]
    value = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    if ACT == "tanh":
        out = tanh(value)
    elif ACT == "relu":
        # A NaN is no number below zero, and stays.
        out = tl.where(value < 0.0, 0.0, value)
    else:
        out = value * share_of(value, ACT)
    tl.store(y + target, narrow(out, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "blocks"])
def act_bwd(
    dy,
    x,
    dx,
    dy_stride0,
    dy_stride1,
    dy_stride2,
    dy_stride,
    x_stride0,
    x_stride1,
    x_stride2,
    x_stride,
    dx_stride0,
    dx_stride1,
    dx_stride2,
    dx_stride,
    size1,
    size2,
    rows,
    width,
    blocks,
    ACT: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx = dy * act'(x)"""
    row, col, inside = tile(rows, width, blocks, ROWS, COLS)
    first = outer(row, size1, size2, dy_stride0, dy_stride1, dy_stride2, DIMS)[:, None] + (col * dy_stride)[None, :]
    second = outer(row, size1, size2, x_stride0, x_stride1, x_stride2, DIMS)[:, None] + (col * x_stride)[None, :]
    target = outer(row, size1, size2, dx_stride0, dx_stride1, dx_stride2, DIMS)[:, None] + (col * dx_stride)[None, :]
    grad = tl.load(dy + first, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
    out = grad * slope_of(value, share_of(value, ACT), ACT)
    tl.store(dx + target, narrow(out, dx.dtype.element_ty), mask=inside)
