"""The zeros around the gradient of a slice: the one move of values that is more than a copy.

dx[..., start : start + N] = dy, zero elsewhere
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.elementwise import outer, tile


@triton.jit(do_not_specialize=["rows", "blocks"])
def pad_last(
    dy,
    dx,
    start,
    stop,
    dy_stride0,
    dy_stride1,
    dy_stride2,
    dy_stride,
    dx_stride0,
    dx_stride1,
    dx_stride2,
    dx_stride,
    size1,
    size2,
    rows,
    width,
    blocks,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS x COLS places of dx, of which columns start to stop are dy's."""
    row, col, inside = tile(rows, width, blocks, ROWS, COLS)
    source = outer(row, size1, size2, dy_stride0, dy_stride1, dy_stride2, DIMS)[:, None]
    target = outer(row, size1, size2, dx_stride0, dx_stride1, dx_stride2, DIMS)[:, None]
    given = (row < rows)[:, None] & ((col >= start) & (col < stop))[None, :]
    value = tl.load(dy + source + ((col - start) * dy_stride)[None, :], mask=given, other=0)
    tl.store(dx + target + (col * dx_stride)[None, :], value, mask=inside)
