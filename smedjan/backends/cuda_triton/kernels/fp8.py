"""Rows as e4m3 codes under a float32 scale each.

    s = max(max |x| / 448, 2^-126);  code = e4m3(x / s), to nearest, ties to even

Micikevicius et al., "FP8 Formats for Deep Learning", 2022. The codes' bits are made by arithmetic: the same on every
architecture (sm_80 has no such type) and in the interpreter. Division, not a product with 1 / s: it cannot be fused
with the sum that rounds.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)
SMALLEST_NORMAL = tl.constexpr(2.0**-6)
ROUNDER = tl.constexpr(16384.0)
"""Its ulp in float32 is 2^-9, e4m3's least number: adding it rounds to a multiple of that."""


@triton.jit
def e4m3(value):
    """The code of float32 numbers, as int32 of 8 bits: sign, 4 bits of exponent (bias 7), 3 of fraction. The largest
    for what is beyond; NaN for NaN."""
    magnitude = tl.minimum(tl.abs(value), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    # float32 has 20 bits of fraction more, and an exponent's bias of 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = (magnitude + ROUNDER).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < SMALLEST_NORMAL, small, normal)
    code = tl.where(value == value, code, 0x7F)
    return code | ((value.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def fp8_quantize(x, codes, scales, stride, rows, width, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ROWS rows of x [rows, width] (`stride` apart), their codes and scales. A row no wider than COLS (WHOLE) is read
    once, a wider one twice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    there = (row < rows)[:, None]
    largest = tl.zeros([ROWS, COLS], dtype=tl.float32)
    value = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, COLS if WHOLE else width, COLS):
        inside = there & (start + col < width)[None, :]
        value = tl.load(x + row[:, None] * stride + start + col[None, :], mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    scale = tl.maximum(tl.div_rn(tl.max(largest, axis=1), LARGEST), SMALLEST_SCALE)
    tl.store(scales + row, scale, mask=row < rows)
    wide = scale[:, None] + tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, COLS if WHOLE else width, COLS):
        inside = there & (start + col < width)[None, :]
        if not WHOLE:
            value = tl.load(x + row[:, None] * stride + start + col[None, :], mask=inside, other=0.0).to(tl.float32)
        code = e4m3(tl.div_rn(value, wide)).to(tl.uint8)
        tl.store(codes + row[:, None] * width + start + col[None, :], code, mask=inside)
