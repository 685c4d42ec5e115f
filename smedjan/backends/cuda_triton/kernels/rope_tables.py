"""cos(p f) and sin(p f) of rotary positions, for positions of any size, and the frequencies that depend on them.

    n = round(a * 2 / pi),  r = a - n * pi / 2,  |r| <= pi / 4;  sin a, cos a = +-sin r or +-cos r, by n modulo 4

a = p * f is rounded to float32, as transformers rounds it; r is taken in float64, whose 53 bits leave more than float32
has of it for every a < 2^20 pi / 2. tl.sin and tl.cos are as accurate, but they are libdevice's on a device, whose way
for large angles leads through local memory (32 bytes of stack as Triton 3.6 builds it), and numpy's in the interpreter:
here both run the same arithmetic. The polynomials for sin r and cos r are those of Cephes' sinf and cosf (Moshier), to
about one ulp.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow

TWO_OVER_PI = tl.constexpr(0.6366197723675814)
HALF_PI = tl.constexpr(1.5707963267341256)
HALF_PI_REST = tl.constexpr(6.077100506506192e-11)
"""pi / 2 as fdlibm's e_rem_pio2 splits it: 33 bits, whose product with n is exact, and what is missing."""

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sin_cos(angle):
    """sin and cos of float32 angles, in float32."""
    wide = angle.to(tl.float64)
    turns = tl.floor(wide * TWO_OVER_PI + 0.5)
    r = (wide - turns * HALF_PI - turns * HALF_PI_REST).to(tl.float32)
    quarter = turns.to(tl.int64) & 3
    z = r * r
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    swapped = (quarter & 1) == 1
    first, second = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    return tl.where(quarter >= 2, -first, first), tl.where((quarter == 1) | (quarter == 2), -second, second)


@triton.jit
def power(base, exponent):
    """base ** exponent in float64, to about 1e-11, for base >= 1 and -1000 < exponent * log2(base) <= 0.

    Triton has no float64 logarithm: base = m 2^k, log m = 2 atanh((m - 1) / (m + 1)), whose series and that of exp run
    until nothing of that size is left."""
    bits = base.to(tl.int64, bitcast=True)
    whole = ((bits >> 52) - 1023).to(tl.float64)
    m = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
    t = (m - 1.0) / (m + 1.0)
    series = t * 0.0 + 1.0 / 25.0
    for i in tl.static_range(12):
        series = series * t * t + 1.0 / (23 - 2 * i)
    log2 = whole + 2.0 * t * series / LN_2
    y = exponent * log2
    lower = tl.floor(y)
    part = (y - lower) * LN_2
    result = part * 0.0 + 1.0
    for i in tl.static_range(14):
        result = result * part / (14 - i) + 1.0
    return result * ((lower.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "count"])
def position_count(positions, out, positions_batch, tokens, count, COLS: tl.constexpr):
    """out[0] = 1 + the largest of `count` positions [batch, tokens]: one program."""
    most = tl.zeros([COLS], dtype=tl.int64)
    for start in range(0, count, COLS):
        place = start + tl.arange(0, COLS)
        at = positions + (place // tokens).to(tl.int64) * positions_batch + place % tokens
        most = tl.maximum(most, tl.load(at, mask=place < count, other=0))
    tl.store(out, tl.max(most, axis=0) + 1)


@triton.jit
def _store_twice(at, value, present, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, COLS: tl.constexpr):
    """value [ROWS, COLS], rounded, at both places of each frequency."""
    value = narrow(value, at.dtype.element_ty)
    if INTERLEAVED:
        place = tl.arange(0, 2 * COLS)[None, :]
        both = tl.reshape(tl.join(value, value), [value.shape[0], 2 * COLS])
        tl.store(at + place, both, mask=present & (place < 2 * HALF))
    else:
        col = tl.arange(0, COLS)[None, :]
        tl.store(at + col, value, mask=present & (col < HALF))
        tl.store(at + HALF + col, value, mask=present & (col < HALF))


@triton.jit(do_not_specialize=["tokens", "limit"])
def rope_tables(
    positions,
    frequencies,
    length,
    cos,
    sin,
    positions_batch,
    table_batch,
    table_token,
    tokens,
    limit,
    scaling,
    HALF: tl.constexpr,
    FACTOR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS positions of one sequence -> cos, sin [ROWS, 2 HALF], times `scaling`; either may be None: not wanted.

    frequencies [HALF] float32. With `length` [1], the number of positions, another frequency holds where it is more
    than `limit`: with FACTOR, of a dynamic rope, f_i s^(-2i / (D - 2)), s = FACTOR length / limit - (FACTOR - 1);
    without, of a longrope, the second row of frequencies [2, HALF]."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    frequency = tl.load(frequencies + col, mask=col < HALF, other=0.0)
    if length is not None:
        count = tl.load(length)
        if FACTOR > 0:
            stretch = FACTOR * tl.maximum(count, limit).to(tl.float64) / limit - (FACTOR - 1.0)
            exponent = -2.0 * col.to(tl.float64) / (2.0 * HALF - 2.0)
            other = (frequency.to(tl.float64) * power(tl.maximum(stretch, 1.0), exponent)).to(tl.float32)
        else:
            other = tl.load(frequencies + HALF + col, mask=col < HALF, other=0.0)
        frequency = tl.where(count > limit, other, frequency)
    position = tl.load(positions + batch * positions_batch + token, mask=token < tokens, other=0).to(tl.float32)
    sine, cosine = sin_cos(position[:, None] * frequency[None, :])
    at = batch * table_batch + token[:, None] * table_token
    present = (token < tokens)[:, None]
    if cos is not None:
        _store_twice(cos + at, cosine * scaling, present, HALF, INTERLEAVED, COLS)
    if sin is not None:
        _store_twice(sin + at, sine * scaling, present, HALF, INTERLEAVED, COLS)
