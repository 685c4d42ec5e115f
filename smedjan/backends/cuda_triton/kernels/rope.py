"""rope: rotary position embedding, half-split (Hugging Face's layout), and its transpose.

    y = x * cos + rotate_half(x) * sin,   rotate_half([a, b]) = [-b, a]

or, with the halves named: y1 = x1 * cos1 - x2 * sin1, y2 = x2 * cos2 + x1 * sin2. The backward pass is the transpose,
dx1 = dy1 * cos1 + dy2 * sin2, dx2 = dy2 * cos2 - dy1 * sin1: where both halves of sin are equal, as they are in every
published model, rope with -sin. x, y [batch, heads, tokens, 2 * half] with any strides and contiguous heads; cos, sin
[batch or 1, tokens, 2 * half]. Su et al., "RoFormer", 2021.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit(do_not_specialize=["heads", "tokens"])
def rope(
    x,
    cos,
    sin,
    y,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    heads,
    tokens,
    half,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS tokens of HEADS heads of one sequence: cos and sin are read once for all of the heads."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (token < tokens)[:, None] & (col < half)[None, :]

    cos_at = cos + batch * cos_batch + token[:, None] * cos_token + col[None, :]
    sin_at = sin + batch * sin_batch + token[:, None] * sin_token + col[None, :]
    cos1 = tl.load(cos_at, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_at + half, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_at, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_at + half, mask=inside, other=0.0).to(tl.float32)

    first = tl.program_id(1) * HEADS
    x_at = x + batch * x_batch + first.to(tl.int64) * x_head + token[:, None] * x_token + col[None, :]
    y_at = y + batch * y_batch + first.to(tl.int64) * y_head + token[:, None] * y_token + col[None, :]
    for _ in range(first, tl.minimum(first + HEADS, heads)):
        x1 = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x_at + half, mask=inside, other=0.0).to(tl.float32)
        if INVERSE:
            y1 = x1 * cos1 + x2 * sin2
            y2 = x2 * cos2 - x1 * sin1
        else:
            y1 = x1 * cos1 - x2 * sin1
            y2 = x2 * cos2 + x1 * sin2
        tl.store(y_at, narrow(y1, y.dtype.element_ty), mask=inside)
        tl.store(y_at + half, narrow(y2, y.dtype.element_ty), mask=inside)
        x_at += x_head
        y_at += y_head
