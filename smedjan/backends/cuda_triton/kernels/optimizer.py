"""AdamW over a flat bucket of parameters, in place; the global norm of gradients in two stages; accumulation.

    g = grad * grad_scale;  p = p * (1 - lr * weight_decay)
    m = m + (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    p = p - lr / bias_correction1 * m / (sqrt(v) / sqrt(bias_correction2) + eps)

torch.optim.AdamW's single-tensor formula and order (decay first), in float32, with correctly rounded square root and
division: the kernel waits for memory, 16 bytes read and 12 written a float32 value, so that accuracy costs no time.
Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.

Moments may be bfloat16, or codes of 8 bits under a scale for each 256 values (Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", 2022); what they are and what is rounded by chance is said in `ops/optimizer.py`.

What changes from step to step is read from memory (`numbers`), never an argument: a captured launch stays valid.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow

BLOCK = tl.constexpr(256)
"""Values under one scale; a tile is ROWS of them."""

ZERO = tl.constexpr(127)
"""The signed code of 0."""

SMALLEST = tl.constexpr(2.0**-126)
"""Least magnitude that a scale divides by: the reciprocal of a smaller one may be infinite."""

LOG10_2 = tl.constexpr(0.3010299956639812)
"""log10(2)"""

SIGNED_MIDDLES = tl.constexpr(129)
UNSIGNED = tl.constexpr(257)
UNSIGNED_MIDDLES = tl.constexpr(513)
"""Where `levels` has what: 129 signed magnitudes, the 128 middles between them, 256 unsigned ones, their 255."""

DECAY = tl.constexpr(0)
STEP_SIZE = tl.constexpr(1)
ROOT_CORRECTION2 = tl.constexpr(2)
STEP = tl.constexpr(3)
SEED_LOW = tl.constexpr(5)
SEED_HIGH = tl.constexpr(7)
"""Places in `numbers`; integers are two there (`_whole`)."""

SEGMENT = tl.constexpr(7)
"""Numbers that `segments` has of a parameter: its first tile, where it begins, its size (two each) and its site."""


@triton.jit
def _whole(numbers, at):
    """The integer of which float32 `numbers` has the part above the last 16 bits, then those bits: exact to 2^40."""
    return tl.load(numbers + at).to(tl.int64) * 65536 + tl.load(numbers + at + 1).to(tl.int64)


@triton.jit
def _segment(segments, count, tile):
    """Where `segments` has the parameter to which this tile belongs: the last one that begins no later."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        later = _whole(segments, middle * SEGMENT) > tile
        low = tl.where(later, low, middle)
        high = tl.where(later, middle, high)
    return segments + low * SEGMENT


@triton.jit
def _chance(numbers, local, site, ROWS: tl.constexpr):
    """16 random bits for each of [ROWS, 256] values, of which the first is number `local` of its parameter: one Philox
    word holds those of two values, one call those of eight."""
    group = (local // 8).to(tl.int32) + tl.arange(0, ROWS)[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    seed = _whole(numbers, SEED_HIGH) << 32 | _whole(numbers, SEED_LOW)
    # As wide as `group`: the first round would otherwise change their shape.
    zero = group * 0
    step = _whole(numbers, STEP).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, group, zero + site, zero + step, zero - 1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, BLOCK))


@triton.jit
def _narrow_by_chance(value, chance):
    """float32 -> bfloat16: up in magnitude where the bits that are cut and the random ones carry."""
    bits = (value.to(tl.uint32, bitcast=True) + chance) >> 16
    # A carry could make a NaN of another number.
    bits = tl.where(value == value, bits, 0x7FC0)
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _level(share, middles, PARTS: tl.constexpr):
    """How many middles lie below share, of [0, 1]: by arithmetic to within one, then against its two neighbours.

    Decade i (1e-6 up to 1) has PARTS 2^i equal parts, and PARTS (2^i - 1) + 1 levels below its own. A float's bits are
    its logarithm, linear between powers of two: at most 0.087 too low, hence i or i - 1. (log2 is 20 instructions.)
    """
    log2 = share.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23 - 127.0
    decade = tl.minimum(tl.maximum(log2 * LOG10_2 + 7.0, 0.0), 6.0).to(tl.int32)
    parts = PARTS << decade
    tenths = share * tl.exp2((6 - decade).to(tl.float32) * (1 / LOG10_2))
    above = (tenths >= 1.0) & (decade < 6)
    parts = tl.where(above, 2 * parts, parts)
    tenths = tl.where(above, 0.1 * tenths, tenths)
    part = ((tenths - 0.1) * (parts.to(tl.float32) * (1 / 0.9))).to(tl.int32)
    level = parts - (PARTS - 1) + tl.minimum(tl.maximum(part, 0), parts - 1)
    up = share > tl.load(middles + level)
    down = share <= tl.load(middles + level - 1)
    return level + up.to(tl.int32) - down.to(tl.int32)


@triton.jit
def _largest(value):
    """The largest magnitude of each row, and the magnitudes as shares of it."""
    magnitude = tl.abs(value)
    absmax = tl.max(magnitude, axis=1)
    return absmax, magnitude * tl.div_rn(1.0, tl.maximum(absmax, SMALLEST))[:, None]


@triton.jit
def _finite(norm):
    """[1] that says whether the scalar is neither infinite nor NaN."""
    return tl.abs(tl.load(norm + tl.arange(0, 1)).to(tl.float32)) < float("inf")


@triton.jit
def keep(new, old, norm, numel, COLS: tl.constexpr):
    """old = new where norm is finite, COLS values."""
    index = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = (index < numel) & _finite(norm)
    tl.store(old + index, tl.load(new + index, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["count"])
def adamw(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    exp_avg_absmax,
    exp_avg_sq_absmax,
    narrow_param,
    grad_scale,
    norm,
    numbers,
    levels,
    segments,
    numel,
    count,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    BY_CHANCE: tl.constexpr,
    SQ_BY_CHANCE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS x 256 values of the bucket.

    narrow_param  None, or what becomes the rounding of param
    norm          None, or a scalar without which being finite nothing is written
    levels        None, or the dynamic data type of the moments, which are codes; their scales are the absmax arrays
    segments      None, or the table of the bucket's `count` parameters: a tile then belongs to one of them, which
                  begins at a multiple of ALIGNMENT and is as long. Random bits follow a value's place in its parameter
    BY_CHANCE     whether param, and SQ_BY_CHANCE whether exp_avg_sq, are rounded stochastically
    """
    tile = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    local = tile * (ROWS * BLOCK)
    start = local
    site = 0
    if segments is not None:
        segment = _segment(segments, count, tile)
        local = (tile - _whole(segment, 0)) * (ROWS * BLOCK)
        start = tl.multiple_of(_whole(segment, 2) + local, ALIGNMENT)
        numel = tl.multiple_of(_whole(segment, 4), ALIGNMENT)
        site = tl.load(segment + 6).to(tl.int32)
    inside = local + offset < numel
    if norm is not None:
        inside = inside & _finite(norm)[:, None]
    index = start + offset

    g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    if grad_scale is not None:
        g = g * tl.load(grad_scale)
    p = tl.load(param + index, mask=inside, other=0.0).to(tl.float32)
    if levels is not None:
        block = start // BLOCK + tl.arange(0, ROWS)
        within = local + tl.arange(0, ROWS) * BLOCK < numel
        if norm is not None:
            within = within & _finite(norm)
        code = tl.load(exp_avg + index, mask=inside, other=0).to(tl.int32)
        m = tl.load(levels + tl.abs(code - ZERO))
        m = tl.where(code < ZERO, -m, m) * tl.load(exp_avg_absmax + block, mask=within, other=0.0)[:, None]
        v = tl.load(levels + UNSIGNED + tl.load(exp_avg_sq + index, mask=inside, other=0).to(tl.int32))
        v = v * tl.load(exp_avg_sq_absmax + block, mask=within, other=0.0)[:, None]
    else:
        m = tl.load(exp_avg + index, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + index, mask=inside, other=0.0).to(tl.float32)

    p = p * tl.load(numbers + DECAY)
    # torch's lerp: from the nearer end.
    if one_minus_beta1 < 0.5:
        m = m + one_minus_beta1 * (g - m)
    else:
        m = g - (g - m) * (1.0 - one_minus_beta1)
    v = v * beta2 + one_minus_beta2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(numbers + ROOT_CORRECTION2)) + eps
    p = p - tl.load(numbers + STEP_SIZE) * tl.div_rn(m, denominator)

    if levels is not None:
        absmax, share = _largest(m)
        level = _level(share, levels + SIGNED_MIDDLES, 1)
        code = tl.where(m < 0.0, ZERO - tl.minimum(level, ZERO), ZERO + level)
        tl.store(exp_avg + index, code.to(tl.uint8), mask=inside)
        tl.store(exp_avg_absmax + block, absmax, mask=within)
        absmax, share = _largest(v)
        level = _level(share, levels + UNSIGNED_MIDDLES, 2)
        # A second moment of zero under a first one that is not would make the next step m / eps.
        level = tl.where((v > 0.0) & (level == 0), 1, level)
        tl.store(exp_avg_sq + index, level.to(tl.uint8), mask=inside)
        tl.store(exp_avg_sq_absmax + block, absmax, mask=within)
    else:
        tl.store(exp_avg + index, narrow(m, exp_avg.dtype.element_ty), mask=inside)
        if SQ_BY_CHANCE:
            v_narrow = _narrow_by_chance(v, _chance(numbers, local, 2 * site + 1, ROWS))
        else:
            v_narrow = narrow(v, exp_avg_sq.dtype.element_ty)
        tl.store(exp_avg_sq + index, v_narrow, mask=inside)
    if BY_CHANCE:
        p_narrow = _narrow_by_chance(p, _chance(numbers, local, 2 * site, ROWS))
    else:
        p_narrow = narrow(p, param.dtype.element_ty)
    tl.store(param + index, p_narrow, mask=inside)
    if narrow_param is not None:
        tl.store(narrow_param + index, narrow(p, narrow_param.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first"])
def square_sum(grad, partial, numel, first, COLS: tl.constexpr):
    """partial[first + program] = the sum of squares of this program's share of a bucket."""
    total = tl.zeros([COLS], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(numel, COLS), tl.num_programs(0)):
        index = block * COLS + tl.arange(0, COLS).to(tl.int64)
        value = tl.load(grad + index, mask=index < numel, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + first + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _coefficient(norm, max_norm):
    """min(1, max_norm / (norm + 1e-6)); of NaN, NaN"""
    ratio = tl.div_rn(max_norm, norm + 1e-6)
    return tl.where(ratio > 1.0, 1.0, ratio)


@triton.jit(do_not_specialize=["count"])
def root_of_sum(partial, norm, coefficient, count, max_norm, COLS: tl.constexpr):
    """norm = sqrt(sum of partial[:count]) and, unless it is None, its clip coefficient: by one program, always in the
    same order."""
    total = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, count, COLS):
        index = start + tl.arange(0, COLS)
        total += tl.load(partial + index, mask=index < count, other=0.0)
    root = tl.sqrt_rn(tl.sum(total, axis=0))
    tl.store(norm, narrow(root, norm.dtype.element_ty))
    if coefficient is not None:
        tl.store(coefficient, _coefficient(root, max_norm))


@triton.jit
def clip_coefficient(norm, coefficient, max_norm):
    """One value."""
    value = _coefficient(tl.load(norm).to(tl.float32), max_norm)
    tl.store(coefficient, narrow(value, coefficient.dtype.element_ty))


@triton.jit
def accumulate(total, grad, numel, COLS: tl.constexpr):
    """total += grad, COLS values."""
    index = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = index < numel
    value = tl.load(total + index, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + index, narrow(value, total.dtype.element_ty), mask=inside)
