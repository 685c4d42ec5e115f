"""lora_linear and lora_linear_group: n linear layers of one input with low-rank adapters beside them, bfloat16.

    low_i = x A_i^T                                   lora_low
    y_i   = x W_i^T + s low_i B_i^T + bias_i          lora_matmul
    g_i   = s dy_i B_i                                lora_low
    dA_i  = g_i^T x;  dB_i = s dy_i^T low_i           lora_grads, lora_sum
    dx    = sum of dy_i W_i + sum of g_i A_i + acc    lora_matmul_dx

x, dx, acc [rows, I], y, dy [rows, sum of O_i], W_i [O_i, I], bias [sum of O_i] bfloat16; A [n r, I], B [sum of O_i, r],
one adapter behind another, low, g [rows, n r] float32. Members without an adapter have no part in A, B, low and g.
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022, eq. 3. The order of blocks in the two large
products is that of Triton's matmul tutorial.

Adapters, their gradients and the saved products are float32, tensor cores take bfloat16. A float32 is the sum of three
bfloat16 (8 + 8 + 8 bits): its product with a bfloat16 is the sum of three products, each exact in float32. So `low`, g,
dA and dB have float32's accuracy at three times bfloat16's work, which is little beside what they read. Where products
of two float32 end in a bfloat16 sum (y, dx), two parts of each are enough: of (h + m)(h' + m') all but m m' is added,
which is 2^-16 of the product, 1/128 of a rounding. y and dx are rounded once.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import dot, narrow


@triton.jit
def two(value):
    """float32 -> the two leading bfloat16 of it"""
    high = narrow(value, tl.bfloat16)
    return high, narrow(value - high.to(tl.float32), tl.bfloat16)


@triton.jit
def three(value):
    """float32 -> three bfloat16 whose sum it is"""
    high = narrow(value, tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = narrow(rest, tl.bfloat16)
    return high, middle, narrow(rest - middle.to(tl.float32), tl.bfloat16)


@triton.jit
def _plus(acc, left, right):
    """acc + left right of float32 factors, to 16 bits of the product"""
    left_high, left_middle = two(left)
    right_high, right_middle = two(right)
    acc = dot(left_middle, right_high, acc)
    acc = dot(left_high, right_middle, acc)
    return dot(left_high, right_high, acc)


@triton.jit
def _pick(index, v0, v1, v2, v3, COUNT: tl.constexpr):
    """The index-th of COUNT values (numbers or pointers)"""
    value = v0
    if COUNT > 1:
        value = tl.where(index == 1, v1, value)
    if COUNT > 2:
        value = tl.where(index == 2, v2, value)
    if COUNT > 3:
        value = tl.where(index == 3, v3, value)
    return value


@triton.jit
def _before(index, v0, v1, v2, COUNT: tl.constexpr):
    """The sum of the first `index` of COUNT values"""
    total = 0
    if COUNT > 1:
        total += tl.where(index > 0, v0, 0)
    if COUNT > 2:
        total += tl.where(index > 1, v1, 0)
    if COUNT > 3:
        total += tl.where(index > 2, v2, 0)
    return total


@triton.jit
def _owner(block, b0, b1, b2, COUNT: tl.constexpr):
    """Whose block this is, of COUNT that have b0, b1, b2, ... blocks"""
    index = 0
    if COUNT > 1:
        index += tl.where(block >= b0, 1, 0)
    if COUNT > 2:
        index += tl.where(block >= b0 + b1, 1, 0)
    if COUNT > 3:
        index += tl.where(block >= b0 + b1 + b2, 1, 0)
    return index


@triton.jit
def _grouped(program, row_blocks, col_blocks, GROUP: tl.constexpr):
    """(row block, column block): GROUP row blocks share a column block of weights while it is in L2"""
    wide = GROUP * col_blocks
    first = program // wide * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + program % wide % size, program % wide // size


@triton.jit(do_not_specialize=["rows"])
def lora_low(
    x,
    factor,
    low,
    x_stride,
    rows,
    s0,
    s1,
    s2,
    s3,
    o0,
    o1,
    o2,
    o3,
    scale,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    LOW_STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """low[:, i RANK : (i + 1) RANK] = scale x[:, s_i : s_i + o_i] F_i, i < COUNT, F_i [o_i, RANK] one behind another

    One launch reads x once: low of all adapters (one F: stacked A, which lies TRANSPOSED), or g of each, from its own
    columns of dy. EVEN: every o_i is a multiple of K.
    """
    part = tl.program_id(1)
    blocks = tl.cdiv(RANK, N)
    row = tl.program_id(0) // blocks * M + tl.arange(0, M)
    col = tl.program_id(0) % blocks * N + tl.arange(0, N)
    width = _pick(part, o0, o1, o2, o3, COUNT)
    depth = tl.arange(0, K)
    # Rows behind the last are read as the last and not stored: the loop has no mask for them.
    x += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride + _pick(part, s0, s1, s2, s3, COUNT)
    if TRANSPOSED:
        factor += depth[:, None] + col[None, :] * o0
    else:
        factor += (_before(part, o0, o1, o2, COUNT) + depth)[:, None] * RANK + col[None, :]
    step: tl.constexpr = 1 if TRANSPOSED else RANK
    leading = tl.zeros([M, N], dtype=tl.float32)
    trailing = tl.zeros([M, N], dtype=tl.float32)
    for start in range(0, width, K):
        if EVEN:
            value = tl.load(x + start + depth[None, :])
            weight = tl.load(factor + start * step, mask=(col < RANK)[None, :], other=0.0)
        else:
            inside = start + depth < width
            value = tl.load(x + start + depth[None, :], mask=inside[None, :], other=0.0)
            inside = inside[:, None] & (col < RANK)[None, :]
            weight = tl.load(factor + start * step, mask=inside, other=0.0)
        high, middle, rest = three(weight)
        leading = dot(value, high, leading)
        trailing = dot(value, middle, trailing)
        trailing = dot(value, rest, trailing)
    at = low + row.to(tl.int64)[:, None] * LOW_STRIDE + part * RANK + col[None, :]
    tl.store(at, (leading + trailing) * scale, mask=(row < rows)[:, None] & (col < RANK)[None, :])


@triton.jit(do_not_specialize=["rows"])
def lora_matmul(
    x,
    w0,
    w1,
    w2,
    w3,
    bias,
    low,
    b,
    y,
    x_stride,
    y_stride,
    rows,
    depth,
    o0,
    o1,
    o2,
    o3,
    scale,
    COUNT: tl.constexpr,
    ADAPTED: tl.constexpr,
    RANK: tl.constexpr,
    LOW_STRIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """An M x N block of y = x W^T + scale low B^T + bias (may be None), of one of COUNT members

    Bit i of ADAPTED: whether member i has an adapter. EVEN: depth is a multiple of K.
    """
    b0, b1, b2 = tl.cdiv(o0, N), tl.cdiv(o1, N), tl.cdiv(o2, N)
    blocks = _before(COUNT - 1, b0, b1, b2, COUNT) + tl.cdiv(_pick(COUNT - 1, o0, o1, o2, o3, COUNT), N)
    row_block, block = _grouped(tl.program_id(0), tl.cdiv(rows, M), blocks, GROUP)
    member = _owner(block, b0, b1, b2, COUNT)
    width = _pick(member, o0, o1, o2, o3, COUNT)
    row = row_block * M + tl.arange(0, M)
    col = (block - _before(member, b0, b1, b2, COUNT)) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    inner_row = tl.minimum(row, rows - 1).to(tl.int64)
    inner_col = tl.minimum(col, width - 1)
    at_x = x + inner_row[:, None] * x_stride + k[None, :]
    at_w = _pick(member, w0, w1, w2, w3, COUNT) + inner_col.to(tl.int64)[None, :] * depth + k[:, None]
    acc = tl.zeros([M, N], dtype=tl.float32)
    for start in range(0, depth, K):
        if EVEN:
            acc = dot(tl.load(at_x + start), tl.load(at_w + start), acc)
        else:
            inside = start + k < depth
            value = tl.load(at_x + start, mask=inside[None, :], other=0.0)
            acc = dot(value, tl.load(at_w + start, mask=inside[:, None], other=0.0), acc)
    # Adapters are counted among the adapted members; where there is none, its products are those of zeros.
    present = RANK * ((ADAPTED >> member) & 1)
    slot = _before(member, ADAPTED & 1, (ADAPTED >> 1) & 1, (ADAPTED >> 2) & 1, COUNT)
    skipped = _before(member, o0 * (ADAPTED & 1), o1 * ((ADAPTED >> 1) & 1), o2 * ((ADAPTED >> 2) & 1), COUNT)
    at_low = low + inner_row[:, None] * LOW_STRIDE + slot * RANK
    at_b = b + (skipped + inner_col)[None, :] * RANK
    for start in tl.range(0, RANK, R, num_stages=1):
        r = start + tl.arange(0, R)
        inside = r < present
        left = tl.load(at_low + r[None, :], mask=inside[None, :], other=0.0) * scale
        acc = _plus(acc, left, tl.load(at_b + r[:, None], mask=inside[:, None], other=0.0))
    first = _before(member, o0, o1, o2, COUNT)
    if bias is not None:
        acc += tl.load(bias + first + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    at = y + row.to(tl.int64)[:, None] * y_stride + first + col[None, :]
    tl.store(at, narrow(acc, y.dtype.element_ty), mask=(row < rows)[:, None] & (col < width)[None, :])


@triton.jit(do_not_specialize=["rows"])
def lora_matmul_dx(
    dy,
    w0,
    w1,
    w2,
    w3,
    g,
    a,
    waiting,
    dx,
    dy_stride,
    waiting_stride,
    dx_stride,
    rows,
    width,
    o0,
    o1,
    o2,
    o3,
    COUNT: tl.constexpr,
    RANKS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """An M x N block of dx = sum of dy_i W_i + g A + waiting (may be None, may lie where dx does)

    RANKS: rows of A. EVEN: every o_i is a multiple of K.
    """
    row_block, block = _grouped(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(width, N), GROUP)
    row = row_block * M + tl.arange(0, M)
    col = block * N + tl.arange(0, N)
    k = tl.arange(0, K)
    inner_row = tl.minimum(row, rows - 1).to(tl.int64)
    at_dy = dy + inner_row[:, None] * dy_stride + k[None, :]
    at_w = k.to(tl.int64)[:, None] * width + col[None, :]
    b0, b1, b2 = tl.cdiv(o0, K), tl.cdiv(o1, K), tl.cdiv(o2, K)
    steps = _before(COUNT - 1, b0, b1, b2, COUNT) + tl.cdiv(_pick(COUNT - 1, o0, o1, o2, o3, COUNT), K)
    acc = tl.zeros([M, N], dtype=tl.float32)
    # One loop over the members' columns, so that loads run ahead from one member into the next.
    for step in range(0, steps):
        member = _owner(step, b0, b1, b2, COUNT)
        inner = (step - _before(member, b0, b1, b2, COUNT)) * K
        at = at_dy + (_before(member, o0, o1, o2, COUNT) + inner)
        weight = _pick(member, w0, w1, w2, w3, COUNT) + tl.cast(inner, tl.int64) * width
        if EVEN:
            acc = dot(tl.load(at), tl.load(weight + at_w, mask=(col < width)[None, :], other=0.0), acc)
        else:
            inside = inner + k < _pick(member, o0, o1, o2, o3, COUNT)
            value = tl.load(at, mask=inside[None, :], other=0.0)
            inside = inside[:, None] & (col < width)[None, :]
            acc = dot(value, tl.load(weight + at_w, mask=inside, other=0.0), acc)
    for start in tl.range(0, RANKS, R, num_stages=1):
        r = start + tl.arange(0, R)
        left = tl.load(g + inner_row[:, None] * RANKS + r[None, :], mask=(r < RANKS)[None, :], other=0.0)
        inside = (r < RANKS)[:, None] & (col < width)[None, :]
        right = tl.load(a + r[:, None] * width + col[None, :], mask=inside, other=0.0)
        acc = _plus(acc, left, right)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    row = row.to(tl.int64)
    if waiting is not None:
        acc += tl.load(waiting + row[:, None] * waiting_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row[:, None] * dx_stride + col[None, :], narrow(acc, dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "chunk"])
def lora_grads(
    x,
    dy,
    g,
    low,
    partial,
    x_stride,
    dy_stride,
    rows,
    chunk,
    depth,
    total,
    s0,
    s1,
    s2,
    s3,
    o0,
    o1,
    o2,
    o3,
    scale,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LOW_STRIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    """partial[split] = dA [RANKS, depth], then dB_i [o_i, RANK], i < COUNT, summed over `chunk` rows (a multiple of M)

    A program has N columns of x, or of one adapted member's part of dy (s_i : s_i + o_i), and R of the factor's.
    """
    a_blocks, b_blocks = tl.cdiv(RANKS, R), tl.cdiv(RANK, R)
    first = tl.cdiv(depth, N) * a_blocks
    block = tl.program_id(0)
    split = tl.program_id(1)
    if block < first:
        across, width, count, factor, begin = a_blocks, depth, RANKS, 1.0, 0
        source, source_stride, other, other_stride = x, x_stride, g, RANKS
    else:
        block -= first
        b0, b1, b2 = tl.cdiv(o0, N) * b_blocks, tl.cdiv(o1, N) * b_blocks, tl.cdiv(o2, N) * b_blocks
        slot = _owner(block, b0, b1, b2, COUNT)
        block -= _before(slot, b0, b1, b2, COUNT)
        across, width, count, factor = b_blocks, _pick(slot, o0, o1, o2, o3, COUNT), RANK, scale
        begin = RANKS * depth + _before(slot, o0, o1, o2, COUNT) * RANK
        source, source_stride = dy + _pick(slot, s0, s1, s2, s3, COUNT), dy_stride
        other, other_stride = low + slot * RANK, LOW_STRIDE
    col = block // across * N + tl.arange(0, N)
    r = block % across * R + tl.arange(0, R)
    leading = tl.zeros([N, R], dtype=tl.float32)
    trailing = tl.zeros([N, R], dtype=tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, rows), M):
        row = (start + tl.arange(0, M)).to(tl.int64)
        inside = row < rows
        value = tl.load(
            source + row[:, None] * source_stride + col[None, :],
            mask=inside[:, None] & (col < width)[None, :],
            other=0.0,
        )
        weight = tl.load(
            other + row[:, None] * other_stride + r[None, :], mask=inside[:, None] & (r < count)[None, :], other=0.0
        )
        high, middle, rest = three(weight)
        leading = dot(tl.trans(value), high, leading)
        trailing = dot(tl.trans(value), middle, trailing)
        trailing = dot(tl.trans(value), rest, trailing)
    made = (leading + trailing) * factor
    inside = (col < width)[:, None] & (r < count)[None, :]
    partial += split.to(tl.int64) * total + begin
    if tl.program_id(0) < first:
        tl.store(partial + r[None, :] * depth + col[:, None], made, mask=inside)
    else:
        tl.store(partial + col[:, None] * RANK + r[None, :], made, mask=inside)


@triton.jit
def lora_sum(
    partial,
    da0,
    da1,
    da2,
    da3,
    db0,
    db1,
    db2,
    db3,
    splits,
    total,
    size,
    c0,
    c1,
    c2,
    c3,
    COUNT: tl.constexpr,
    COLS: tl.constexpr,
):
    """dA_i (`size` values each) and dB_i (c_i values), i < COUNT: sums of their places in the rows of `partial`"""
    blocks = tl.cdiv(size, COLS)
    block = tl.program_id(0)
    if block < blocks * COUNT:
        slot = block // blocks
        col = block % blocks * COLS + tl.arange(0, COLS)
        count, start = size, slot * size
        out = _pick(slot, da0, da1, da2, da3, COUNT)
    else:
        block -= blocks * COUNT
        b0, b1, b2 = tl.cdiv(c0, COLS), tl.cdiv(c1, COLS), tl.cdiv(c2, COLS)
        slot = _owner(block, b0, b1, b2, COUNT)
        col = (block - _before(slot, b0, b1, b2, COUNT)) * COLS + tl.arange(0, COLS)
        count, start = _pick(slot, c0, c1, c2, c3, COUNT), size * COUNT + _before(slot, c0, c1, c2, COUNT)
        out = _pick(slot, db0, db1, db2, db3, COUNT)
    value = tl.zeros([COLS], dtype=tl.float32)
    partial += start + col
    for _ in range(0, splits):
        value += tl.load(partial, mask=col < count, other=0.0)
        partial += total
    tl.store(out + col, value, mask=col < count)
