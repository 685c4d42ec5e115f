"""rope: the rotation of heads and its transpose, with the norm of each head where there is one; and its tables.

    y1 = x1 * cos1 - x2 * sin1,  y2 = x2 * cos2 + x1 * sin2

x1 and x2 are the two halves of a head's first 2 HALF dims (Hugging Face's layout), or their even and odd dims where
INTERLEAVED (Cohere); the other REST dims are copied. The backward pass is the transpose, dx1 = dy1 * cos1 + dy2 * sin2,
dx2 = dy2 * cos2 - dy1 * sin1: where both parts of sin are equal, as they are in every published model, rope with -sin.

With a weight the rotation is of n * (offset + weight), n = x * rstd, rstd = rsqrt(mean(x^2) + eps), over the whole head
(qk_norm_rope). Backward, with g the transpose's result and h = g * (offset + weight):

    dx = rstd * (h - n * mean(h * n)),  dw = sum over heads and tokens of g * n

q, k, ... [batch, heads, tokens, 2 HALF + REST] with any strides and contiguous heads; cos, sin [batch or 1, tokens,
2 HALF], at the same strides. In float32, rounded once. One launch takes the heads of q and those of k; each program
owns whole heads, so that a result may take its input's place. Su et al., "RoFormer", 2021; Henry et al., "Query-Key
Normalization for Transformers", 2020.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit
def _pair(at, present, HALF: tl.constexpr, COLS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two parts of each row's first 2 HALF values, [ROWS, COLS] each, in float32; zero beyond."""
    if INTERLEAVED:
        # Whole pairs at once: every other value would be read two bytes at a time.
        place = tl.arange(0, 2 * COLS)[None, :]
        value = tl.load(at + place, mask=present & (place < 2 * HALF), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(value, [value.shape[0], COLS, 2]))
    else:
        col = tl.arange(0, COLS)[None, :]
        inside = present & (col < HALF)
        first = tl.load(at + col, mask=inside, other=0.0).to(tl.float32)
        return first, tl.load(at + HALF + col, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_pair(at, first, second, present, HALF: tl.constexpr, COLS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The opposite of `_pair`, rounded."""
    first, second = narrow(first, at.dtype.element_ty), narrow(second, at.dtype.element_ty)
    if INTERLEAVED:
        place = tl.arange(0, 2 * COLS)[None, :]
        both = tl.reshape(tl.join(first, second), [first.shape[0], 2 * COLS])
        tl.store(at + place, both, mask=present & (place < 2 * HALF))
    else:
        col = tl.arange(0, COLS)[None, :]
        tl.store(at + col, first, mask=present & (col < HALF))
        tl.store(at + HALF + col, second, mask=present & (col < HALF))


@triton.jit
def _turn(
    x_at,
    weight,
    y_at,
    x_head,
    y_head,
    heads,
    present,
    cos1,
    cos2,
    sin1,
    sin2,
    eps,
    offset,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    COLS: tl.constexpr,
    REST_COLS: tl.constexpr,
):
    """`heads` heads, from x_at on, of some tokens [ROWS, 1]."""
    beyond = tl.arange(0, REST_COLS)[None, :]
    if weight is not None:
        always = tl.full([1, 1], 1, tl.int1)
        gain1, gain2 = _pair(weight, always, HALF, COLS, INTERLEAVED)
        gain1, gain2 = gain1 + offset, gain2 + offset
        if REST > 0:
            gain3 = tl.load(weight + 2 * HALF + beyond, mask=beyond < REST, other=0.0).to(tl.float32) + offset
    for _ in range(heads):
        x1, x2 = _pair(x_at, present, HALF, COLS, INTERLEAVED)
        if REST > 0:
            x3 = tl.load(x_at + 2 * HALF + beyond, mask=present & (beyond < REST), other=0.0).to(tl.float32)
        if weight is not None:
            square = tl.sum(x1 * x1 + x2 * x2, axis=1)
            if REST > 0:
                square += tl.sum(x3 * x3, axis=1)
            rstd = tl.rsqrt(square / (2 * HALF + REST) + eps)[:, None]
            x1, x2 = x1 * rstd * gain1, x2 * rstd * gain2
            if REST > 0:
                x3 = x3 * rstd * gain3
        if INVERSE:
            y1 = x1 * cos1 + x2 * sin2
            y2 = x2 * cos2 - x1 * sin1
        else:
            y1 = x1 * cos1 - x2 * sin1
            y2 = x2 * cos2 + x1 * sin2
        _store_pair(y_at, y1, y2, present, HALF, COLS, INTERLEAVED)
        if REST > 0:
            y3 = narrow(x3, y_at.dtype.element_ty)
            tl.store(y_at + 2 * HALF + beyond, y3, mask=present & (beyond < REST))
        x_at += x_head
        y_at += y_head


@triton.jit(do_not_specialize=["q_heads", "k_heads", "tokens", "group", "q_groups"])
def rope(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_out,
    k_out,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    table_batch,
    table_token,
    q_heads,
    k_heads,
    tokens,
    group,
    q_groups,
    eps,
    offset,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    REST_COLS: tl.constexpr,
):
    """ROWS tokens of a group of heads of one sequence: cos and sin are read once for all of the group. The first
    q_groups groups are q's, the others k's. q or k may be None; so may the weights, and then nothing is normed."""
    batch = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    present = token < tokens
    table = batch * table_batch + token * table_token
    cos1, cos2 = _pair(cos + table, present, HALF, COLS, INTERLEAVED)
    sin1, sin2 = _pair(sin + table, present, HALF, COLS, INTERLEAVED)
    if tl.program_id(1) < q_groups:
        if q is not None:
            first = tl.program_id(1) * group
            _turn(
                q + batch * q_batch + first.to(tl.int64) * q_head + token * q_token,
                q_weight,
                q_out + batch * q_out_batch + first.to(tl.int64) * q_out_head + token * q_out_token,
                q_head,
                q_out_head,
                tl.minimum(group, q_heads - first),
                present,
                cos1,
                cos2,
                sin1,
                sin2,
                eps,
                offset,
                HALF,
                REST,
                INTERLEAVED,
                INVERSE,
                COLS,
                REST_COLS,
            )
    else:
        if k is not None:
            first = (tl.program_id(1) - q_groups) * group
            _turn(
                k + batch * k_batch + first.to(tl.int64) * k_head + token * k_token,
                k_weight,
                k_out + batch * k_out_batch + first.to(tl.int64) * k_out_head + token * k_out_token,
                k_head,
                k_out_head,
                tl.minimum(group, k_heads - first),
                present,
                cos1,
                cos2,
                sin1,
                sin2,
                eps,
                offset,
                HALF,
                REST,
                INTERLEAVED,
                INVERSE,
                COLS,
                REST_COLS,
            )


@triton.jit
def _norm_bwd(
    dy,
    x,
    weight,
    dx,
    partial,
    cos,
    sin,
    dy_batch,
    dy_head,
    dy_token,
    x_batch,
    x_head,
    x_token,
    dx_batch,
    dx_head,
    dx_token,
    table_batch,
    table_token,
    first,
    heads,
    tokens,
    tiles,
    eps,
    offset,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    REST_COLS: tl.constexpr,
):
    """dx of `heads` heads from `first` on, of this program's tiles of tokens, and its share of dw [2 HALF + REST]."""
    always = tl.full([1, 1], 1, tl.int1)
    beyond = tl.arange(0, REST_COLS)[None, :]
    gain1, gain2 = _pair(weight, always, HALF, COLS, INTERLEAVED)
    gain1, gain2 = gain1 + offset, gain2 + offset
    dw1, dw2 = tl.zeros([ROWS, COLS], dtype=tl.float32), tl.zeros([ROWS, COLS], dtype=tl.float32)
    if REST > 0:
        gain3 = tl.load(weight + 2 * HALF + beyond, mask=beyond < REST, other=0.0).to(tl.float32) + offset
        dw3 = tl.zeros([ROWS, REST_COLS], dtype=tl.float32)
    row_tiles = tl.cdiv(tokens, ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        batch = (tile // row_tiles).to(tl.int64)
        token = ((tile % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        present = token < tokens
        table = batch * table_batch + token * table_token
        cos1, cos2 = _pair(cos + table, present, HALF, COLS, INTERLEAVED)
        sin1, sin2 = _pair(sin + table, present, HALF, COLS, INTERLEAVED)
        dy_at = dy + batch * dy_batch + first.to(tl.int64) * dy_head + token * dy_token
        x_at = x + batch * x_batch + first.to(tl.int64) * x_head + token * x_token
        if dx is not None:
            dx_at = dx + batch * dx_batch + first.to(tl.int64) * dx_head + token * dx_token
        for _ in range(heads):
            x1, x2 = _pair(x_at, present, HALF, COLS, INTERLEAVED)
            y1, y2 = _pair(dy_at, present, HALF, COLS, INTERLEAVED)
            g1, g2 = y1 * cos1 + y2 * sin2, y2 * cos2 - y1 * sin1
            square = tl.sum(x1 * x1 + x2 * x2, axis=1)
            if REST > 0:
                inside = present & (beyond < REST)
                x3 = tl.load(x_at + 2 * HALF + beyond, mask=inside, other=0.0).to(tl.float32)
                g3 = tl.load(dy_at + 2 * HALF + beyond, mask=inside, other=0.0).to(tl.float32)
                square += tl.sum(x3 * x3, axis=1)
            rstd = tl.rsqrt(square / (2 * HALF + REST) + eps)[:, None]
            n1, n2 = x1 * rstd, x2 * rstd
            if REST > 0:
                n3 = x3 * rstd
            if partial is not None:
                dw1 += g1 * n1
                dw2 += g2 * n2
                if REST > 0:
                    dw3 += g3 * n3
            if dx is not None:
                h1, h2 = g1 * gain1, g2 * gain2
                tilt = tl.sum(h1 * n1 + h2 * n2, axis=1)
                if REST > 0:
                    h3 = g3 * gain3
                    tilt += tl.sum(h3 * n3, axis=1)
                tilt = tilt[:, None] / (2 * HALF + REST)
                out1, out2 = rstd * (h1 - n1 * tilt), rstd * (h2 - n2 * tilt)
                _store_pair(dx_at, out1, out2, present, HALF, COLS, INTERLEAVED)
                if REST > 0:
                    out3 = narrow(rstd * (h3 - n3 * tilt), dx.dtype.element_ty)
                    tl.store(dx_at + 2 * HALF + beyond, out3, mask=inside)
                dx_at += dx_head
            x_at += x_head
            dy_at += dy_head
    if partial is not None:
        at = partial + tl.arange(0, 1)[:, None]
        dw1, dw2 = tl.sum(dw1, axis=0)[None, :], tl.sum(dw2, axis=0)[None, :]
        _store_pair(at, dw1, dw2, always, HALF, COLS, INTERLEAVED)
        if REST > 0:
            tl.store(at + 2 * HALF + beyond, tl.sum(dw3, axis=0)[None, :], mask=beyond < REST)


@triton.jit(do_not_specialize=["q_heads", "k_heads", "tokens", "tiles", "group", "q_groups"])
def qk_norm_rope_bwd(
    dq,
    dk,
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    dq_out,
    dk_out,
    q_partial,
    k_partial,
    dq_batch,
    dq_head,
    dq_token,
    dk_batch,
    dk_head,
    dk_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    dq_out_batch,
    dq_out_head,
    dq_out_token,
    dk_out_batch,
    dk_out_head,
    dk_out_token,
    table_batch,
    table_token,
    q_heads,
    k_heads,
    tokens,
    tiles,
    group,
    q_groups,
    eps,
    offset,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    REST_COLS: tl.constexpr,
):
    """A group of heads (the first q_groups groups are q's) of every num_programs(0)-th of `tiles` tiles of ROWS tokens,
    counted through all sequences.

    q_partial [q_groups, programs, 2 HALF + REST] float32, k_partial likewise. dq, dk, each result and each partial sum
    may be None: not given, not wanted."""
    if tl.program_id(1) < q_groups:
        if dq is not None:
            first = tl.program_id(1) * group
            q_place = q_partial
            if q_partial is not None:
                share = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
                q_place = q_partial + share.to(tl.int64) * (2 * HALF + REST)
            _norm_bwd(
                dq,
                q,
                q_weight,
                dq_out,
                q_place,
                cos,
                sin,
                dq_batch,
                dq_head,
                dq_token,
                q_batch,
                q_head,
                q_token,
                dq_out_batch,
                dq_out_head,
                dq_out_token,
                table_batch,
                table_token,
                first,
                tl.minimum(group, q_heads - first),
                tokens,
                tiles,
                eps,
                offset,
                HALF,
                REST,
                INTERLEAVED,
                ROWS,
                COLS,
                REST_COLS,
            )
    else:
        if dk is not None:
            first = (tl.program_id(1) - q_groups) * group
            k_place = k_partial
            if k_partial is not None:
                share = (tl.program_id(1) - q_groups) * tl.num_programs(0) + tl.program_id(0)
                k_place = k_partial + share.to(tl.int64) * (2 * HALF + REST)
            _norm_bwd(
                dk,
                k,
                k_weight,
                dk_out,
                k_place,
                cos,
                sin,
                dk_batch,
                dk_head,
                dk_token,
                k_batch,
                k_head,
                k_token,
                dk_out_batch,
                dk_out_head,
                dk_out_token,
                table_batch,
                table_token,
                first,
                tl.minimum(group, k_heads - first),
                tokens,
                tiles,
                eps,
                offset,
                HALF,
                REST,
                INTERLEAVED,
                ROWS,
                COLS,
                REST_COLS,
            )
