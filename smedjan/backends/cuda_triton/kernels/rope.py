"""rope: rotary position embedding and its transpose, over the first 2 * half dims of a head.

    y1 = x1 * cos1 - x2 * sin1,  y2 = x2 * cos2 + x1 * sin2

x1 and x2 are the two halves (Hugging Face's layout), or the even and the odd dims where INTERLEAVED (Cohere); the other
`rest` dims of a head are copied. The backward pass is the transpose, dx1 = dy1 * cos1 + dy2 * sin2,
dx2 = dy2 * cos2 - dy1 * sin1: where both parts of sin are equal, as they are in every published model, rope with -sin.
x, y [batch, heads, tokens, 2 * half + rest] with any strides and contiguous heads; cos, sin [batch or 1, tokens,
2 * half]. In float32, rounded once. Su et al., "RoFormer", 2021.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit
def _pair(at, inside, both, half, COLS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two parts of each row's first 2 * half values, [ROWS, COLS] each, in float32. `both` masks 2 * COLS."""
    if INTERLEAVED:
        # Whole pairs at once: every other value would be read two bytes at a time.
        value = tl.load(at + tl.arange(0, 2 * COLS)[None, :], mask=both, other=0.0).to(tl.float32)
        return tl.split(tl.reshape(value, [value.shape[0], COLS, 2]))
    else:
        at += tl.arange(0, COLS)[None, :]
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        return first, tl.load(at + half, mask=inside, other=0.0).to(tl.float32)


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
    rest,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    REST: tl.constexpr,
):
    """ROWS tokens of HEADS heads of one sequence: cos and sin are read once for all of the heads."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    present = (token < tokens)[:, None]
    inside = present & (col < half)[None, :]
    both = present & (tl.arange(0, 2 * COLS) < 2 * half)[None, :]

    cos_at = cos + batch * cos_batch + token[:, None] * cos_token
    sin_at = sin + batch * sin_batch + token[:, None] * sin_token
    cos1, cos2 = _pair(cos_at, inside, both, half, COLS, INTERLEAVED)
    sin1, sin2 = _pair(sin_at, inside, both, half, COLS, INTERLEAVED)

    first = tl.program_id(1) * HEADS
    x_at = x + batch * x_batch + first.to(tl.int64) * x_head + token[:, None] * x_token
    y_at = y + batch * y_batch + first.to(tl.int64) * y_head + token[:, None] * y_token
    for _ in range(first, tl.minimum(first + HEADS, heads)):
        x1, x2 = _pair(x_at, inside, both, half, COLS, INTERLEAVED)
        if INVERSE:
            y1 = x1 * cos1 + x2 * sin2
            y2 = x2 * cos2 - x1 * sin1
        else:
            y1 = x1 * cos1 - x2 * sin1
            y2 = x2 * cos2 + x1 * sin2
        y1, y2 = narrow(y1, y.dtype.element_ty), narrow(y2, y.dtype.element_ty)
        if INTERLEAVED:
            tl.store(y_at + tl.arange(0, 2 * COLS)[None, :], tl.reshape(tl.join(y1, y2), [ROWS, 2 * COLS]), mask=both)
        else:
            tl.store(y_at + col[None, :], y1, mask=inside)
            tl.store(y_at + half + col[None, :], y2, mask=inside)
        if REST > 0:
            place = 2 * half + tl.arange(0, REST)[None, :]
            beyond = present & (tl.arange(0, REST) < rest)[None, :]
            tl.store(y_at + place, tl.load(x_at + place, mask=beyond, other=0.0), mask=beyond)
        x_at += x_head
        y_at += y_head
