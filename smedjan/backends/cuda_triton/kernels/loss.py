"""Losses of a head: one row of logits a program. A row is read twice and written once, over itself.

    z = unit * s      s = v, unit = gain                        of a logit v
                      s = tanh(tilt v), unit = cap              capped, tilt = gain / cap
    lse = log(sum over v of exp(z))

    cross_entropy   loss = lse - z[label] + z_loss lse^2,       dz = (1 + 2 z_loss lse) softmax(z) - onehot(label)
        smoothed    z[label] becomes (1 - e) z[label] + e mean(z), and the onehot (1 - e) onehot(label) + e / V
    log_probs       log p = z[label] - lse,                     dz = (onehot(label) - softmax(z)) dlogp
    kl              loss = T^2 KL(a || b),                      dz in `kl`

What is written over a logit is dz dz/dv and what the loss is scaled by: dz/dv = gain, capped gain (1 - s^2).

logits [rows, vocab] (dlogits replace them), `stride` apart, labels [rows] int64, losses [rows] float32. A row whose
label is -100 has loss 0, lse 0 and gradient 0, and none of its logits is read. A label outside the vocabulary makes its
loss NaN, which the loss curve shows at once: the host cannot look at labels without waiting for the device.

A tile is [RUNS, RUN] logits, RUN of them 16 bytes of one thread. Each run keeps its own online softmax (Milakov and
Gimelshein, 2018), s - peak under a sum of exponentials, so that the first pass has no barrier but at its end: one more
exponential for RUN of them. Rows are padded to `width`, a multiple of 16, so that a mask never splits a run; what lies
in the padding is nobody's. The second pass goes back from the row's end, which the first has left in the L2 cache. The
gradient in the forward pass and in place is Liger Kernel's (Hsu et al., 2024).
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow, tanh

IGNORE = tl.constexpr(-100)
"""Label of a row that is not trained, as in torch and transformers."""

LOG2_E = tl.constexpr(1.4426950408889634)

LOWEST = tl.constexpr(-1.0e30)
"""Below every logit, and finite, so that a run of -inf alone gives exp(-inf) = 0 and not exp(-inf + inf) = NaN."""


@triton.jit
def _score(value, tilt, CAPPED: tl.constexpr):
    """s of a logit"""
    if CAPPED:
        return tanh(value * tilt)
    else:
        return value


@triton.jit
def _columns(start, RUNS: tl.constexpr, RUN: tl.constexpr):
    """[RUNS, RUN] columns from `start` on"""
    return start + tl.arange(0, RUNS)[:, None] * RUN + tl.arange(0, RUN)[None, :]


@triton.jit
def _scores(at, col, vocab, width, tilt, CAPPED: tl.constexpr):
    """s of a row's columns, -inf beyond the vocabulary"""
    value = tl.load(at + col, mask=col < width, other=0.0).to(tl.float32)
    return tl.where(col < vocab, _score(value, tilt, CAPPED), -float("inf"))


@triton.jit
def _row_sum(at, vocab, width, tilt, rate, smoothing, CAPPED: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):
    """peak = max s, sum of exp(unit (s - peak)) and sum of s (0 where smoothing is None); rate = unit log2(e)"""
    peak = tl.full([RUNS], LOWEST, dtype=tl.float32)
    total = tl.zeros([RUNS], dtype=tl.float32)
    plain = tl.zeros([RUNS], dtype=tl.float32)
    for start in range(0, width, RUNS * RUN):
        score = _scores(at, _columns(start, RUNS, RUN), vocab, width, tilt, CAPPED)
        higher = tl.maximum(peak, tl.max(score, axis=1))
        terms = tl.exp2((score - higher[:, None]) * rate)
        total = total * tl.exp2((peak - higher) * rate) + tl.sum(terms, axis=1)
        if smoothing is not None:
            plain += tl.sum(tl.where(_columns(start, RUNS, RUN) < vocab, score, 0.0), axis=1)
        peak = higher
    highest = tl.max(peak, axis=0)
    return highest, tl.sum(total * tl.exp2((peak - highest) * rate), axis=0), tl.sum(plain, axis=0)


@triton.jit
def _target(at, label, vocab, tilt, CAPPED: tl.constexpr):
    """s of the label, NaN where that is outside the vocabulary"""
    inside = (label >= 0) & (label < vocab)
    return _score(tl.load(at + label, mask=inside, other=float("nan")).to(tl.float32), tilt, CAPPED)


@triton.jit
def _store(at, col, width, gradient, score, CAPPED: tl.constexpr):
    """gradient by dz/dv, but for its constant gain, over the logits"""
    if CAPPED:
        # In the padding s is -inf: the slope there is made 0, not 0 times infinity.
        score = tl.maximum(score, -1.0)
        gradient = gradient * (1.0 - score * score)
    tl.store(at + col, narrow(gradient, at.dtype.element_ty), mask=col < width)


@triton.jit
def _clear(at, width, RUNS: tl.constexpr, RUN: tl.constexpr):
    """0 over a row's logits"""
    for start in range(0, width, RUNS * RUN):
        col = _columns(start, RUNS, RUN)
        tl.store(at + col, tl.zeros([RUNS, RUN], dtype=tl.float32).to(at.dtype.element_ty), mask=col < width)


@triton.jit
def cross_entropy(
    logits,
    labels,
    num_items,
    losses,
    tilt,
    unit,
    gain,
    z_loss,
    smoothing,
    stride,
    vocab,
    width,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """losses (unless None), and with GRADIENT dlogits of losses / num_items, a scalar that only the device knows.

    `smoothing` is None where labels are not smoothed.
    """
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    label = tl.load(labels + row)
    if label != IGNORE:
        rate = unit * LOG2_E
        target = _target(at, label, vocab, tilt, CAPPED)
        peak, total, plain = _row_sum(at, vocab, width, tilt, rate, smoothing, CAPPED, RUNS, RUN)
        lse = peak * unit + tl.log(total)
        if losses is not None:
            below = peak - target
            if smoothing is not None:
                below = (1.0 - smoothing) * below + smoothing * (peak - plain / vocab)
            # Apart from lse, whose own rounding a large peak would bring in.
            tl.store(losses + row, below * unit + tl.log(total) + z_loss * lse * lse)
        if GRADIENT:
            # The row is overwritten below: every warp must have read its target and its last runs.
            tl.debug_barrier()
            scale = gain / tl.load(num_items).to(tl.float32)
            share = (1.0 + 2.0 * z_loss * lse) / total * scale
            aim = scale
            if smoothing is not None:
                aim = (1.0 - smoothing) * scale
            last = (width - 1) // (RUNS * RUN) * (RUNS * RUN)
            for back in range(0, width, RUNS * RUN):
                col = _columns(last - back, RUNS, RUN)
                score = _scores(at, col, vocab, width, tilt, CAPPED)
                gradient = tl.exp2((score - peak) * rate) * share
                if smoothing is not None:
                    gradient = tl.where(col < vocab, gradient - smoothing / vocab * scale, gradient)
                gradient = tl.where(col == label.to(tl.int32), gradient - aim, gradient)
                _store(at, col, width, gradient, score, CAPPED)
    else:
        if losses is not None:
            tl.store(losses + row, 0.0)
        if GRADIENT:
            _clear(at, width, RUNS, RUN)


@triton.jit
def log_probs(
    logits,
    labels,
    out,
    lse,
    tilt,
    unit,
    stride,
    vocab,
    width,
    CAPPED: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """out = log p of each row's label; lse [rows, 2] as its two terms, the largest z and log(sum of exp(z - largest)).

    Added, they would be rounded by u times the largest, which every gradient would inherit. Either may be None.
    """
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    label = tl.load(labels + row)
    log_prob, top, rest = 0.0, 0.0, 0.0
    if label != IGNORE:
        target = _target(at, label, vocab, tilt, CAPPED)
        peak, total, _ = _row_sum(at, vocab, width, tilt, unit * LOG2_E, None, CAPPED, RUNS, RUN)
        top, rest = peak * unit, tl.log(total)
        log_prob = (target - peak) * unit - rest
    if out is not None:
        tl.store(out + row, log_prob)
    if lse is not None:
        tl.store(lse + 2 * row, top)
        tl.store(lse + 2 * row + 1, rest)


@triton.jit
def log_probs_bwd(
    logits,
    labels,
    lse,
    dy,
    tilt,
    unit,
    gain,
    stride,
    vocab,
    width,
    CAPPED: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """dlogits of `log_probs`, whose lse this is; dy [rows] float32"""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    label = tl.load(labels + row)
    if label != IGNORE:
        top, rest = tl.load(lse + 2 * row), tl.load(lse + 2 * row + 1)
        scale = tl.load(dy + row) * gain
        for start in range(0, width, RUNS * RUN):
            col = _columns(start, RUNS, RUN)
            score = _scores(at, col, vocab, width, tilt, CAPPED)
            prob = tl.exp((score * unit - top) - rest)
            gradient = tl.where(col == label.to(tl.int32), 1.0 - prob, -prob) * scale
            _store(at, col, width, gradient, score, CAPPED)
    else:
        _clear(at, width, RUNS, RUN)


@triton.jit
def kl(
    logits,
    teacher,
    labels,
    num_items,
    losses,
    tilt,
    unit,
    gain,
    teacher_tilt,
    teacher_unit,
    factor,
    stride,
    teacher_stride,
    vocab,
    width,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """losses = factor KL(a || b) and dlogits of losses / num_items, of the student's logits alone.

    q = softmax(z) is the student's, p the teacher's, units hold 1 / temperature, as gain does. a is p, b is q, but with
    REVERSE a is q and b is p. Each z is taken less its own largest, so that lse is the log of `total` alone; with
    w = z_student - z_teacher and its mean m under a, a sum of the first pass,

        KL(p || q) = lse_student - lse_teacher - m,     dz = q - p
        KL(q || p) = m - (lse_student - lse_teacher),   dz = q (w - m)

    A run's sum of a w is for its peaks so far: it moves with them.
    """
    row = tl.program_id(0).to(tl.int64)
    at, beside = logits + row * stride, teacher + row * teacher_stride
    label = tl.load(labels + row)
    if label != IGNORE:
        peak = tl.full([RUNS], LOWEST, dtype=tl.float32)
        teacher_peak = tl.full([RUNS], LOWEST, dtype=tl.float32)
        total = tl.zeros([RUNS], dtype=tl.float32)
        teacher_total = tl.zeros([RUNS], dtype=tl.float32)
        cross = tl.zeros([RUNS], dtype=tl.float32)
        for start in range(0, width, RUNS * RUN):
            col = _columns(start, RUNS, RUN)
            score = _scores(at, col, vocab, width, tilt, CAPPED)
            teacher_score = _scores(beside, col, vocab, width, teacher_tilt, TEACHER_CAPPED)
            higher = tl.maximum(peak, tl.max(score, axis=1))
            teacher_higher = tl.maximum(teacher_peak, tl.max(teacher_score, axis=1))
            z = (score - higher[:, None]) * unit
            teacher_z = (teacher_score - teacher_higher[:, None]) * teacher_unit
            terms, teacher_terms = tl.exp(z), tl.exp(teacher_z)
            drop, teacher_drop = (peak - higher) * unit, (teacher_peak - teacher_higher) * teacher_unit
            # Beyond the vocabulary both are -inf.
            apart = tl.where(col < vocab, z - teacher_z, 0.0)
            if REVERSE:
                cross = (cross + total * (drop - teacher_drop)) * tl.exp(drop) + tl.sum(terms * apart, axis=1)
            else:
                cross += teacher_total * (drop - teacher_drop)
                cross = cross * tl.exp(teacher_drop) + tl.sum(teacher_terms * apart, axis=1)
            total = total * tl.exp(drop) + tl.sum(terms, axis=1)
            teacher_total = teacher_total * tl.exp(teacher_drop) + tl.sum(teacher_terms, axis=1)
            peak, teacher_peak = higher, teacher_higher
        higher, teacher_higher = tl.max(peak, axis=0), tl.max(teacher_peak, axis=0)
        drop, teacher_drop = (peak - higher) * unit, (teacher_peak - teacher_higher) * teacher_unit
        fade, teacher_fade = tl.exp(drop), tl.exp(teacher_drop)
        if REVERSE:
            crossed = tl.sum((cross + total * (drop - teacher_drop)) * fade, axis=0)
        else:
            crossed = tl.sum((cross + teacher_total * (drop - teacher_drop)) * teacher_fade, axis=0)
        row_total, teacher_row_total = tl.sum(total * fade, axis=0), tl.sum(teacher_total * teacher_fade, axis=0)
        offset = tl.log(row_total) - tl.log(teacher_row_total)
        mean = crossed / (row_total if REVERSE else teacher_row_total)
        if losses is not None:
            tl.store(losses + row, (mean - offset if REVERSE else offset - mean) * factor)
        if GRADIENT:
            scale = gain * factor / tl.load(num_items).to(tl.float32)
            share, teacher_share = scale / row_total, scale / teacher_row_total
            last = (width - 1) // (RUNS * RUN) * (RUNS * RUN)
            for back in range(0, width, RUNS * RUN):
                col = _columns(last - back, RUNS, RUN)
                score = _scores(at, col, vocab, width, tilt, CAPPED)
                teacher_score = _scores(beside, col, vocab, width, teacher_tilt, TEACHER_CAPPED)
                z, teacher_z = (score - higher) * unit, (teacher_score - teacher_higher) * teacher_unit
                gradient = tl.exp(z) * share
                if REVERSE:
                    gradient *= tl.where(col < vocab, z - teacher_z, 0.0) - mean
                else:
                    gradient -= tl.exp(teacher_z) * teacher_share
                _store(at, col, width, gradient, score, CAPPED)
    else:
        if losses is not None:
            tl.store(losses + row, 0.0)
        if GRADIENT:
            _clear(at, width, RUNS, RUN)


@triton.jit(do_not_specialize=["count"])
def sum_losses(losses, num_items, loss, count, COLS: tl.constexpr):
    """loss = sum of losses [count] / num_items, in one order whatever the device: one program, one column a value."""
    col = tl.arange(0, COLS)
    total = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, count, COLS):
        total += tl.load(losses + start + col, mask=start + col < count, other=0.0)
    tl.store(loss, tl.sum(total, axis=0) / tl.load(num_items).to(tl.float32))


@triton.jit
def rounded(source, out, count, COLS: tl.constexpr):
    """out = source [count] float32, rounded once"""
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    value = tl.load(source + col, mask=col < count)
    tl.store(out + col, narrow(value, out.dtype.element_ty), mask=col < count)
