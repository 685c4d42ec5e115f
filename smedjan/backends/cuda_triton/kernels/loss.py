"""cross_entropy: one row of logits a program, forward, backward, or both with one visit.

    z       = cap * tanh(gain * logits / cap), or gain * logits
    lse     = log(sum over v of exp(z[v]))
    loss    = lse - z[label]
    dlogits = (exp(z - lse) - onehot(label)) * scale * gain * (1 - (z / cap)^2)

logits [rows, vocab] (dlogits replace them), labels [rows] int64, loss, lse [rows] float32. A row whose label is
`ignore_index` has loss 0, lse 0 and gradient 0. A label outside the vocabulary makes its loss NaN, which the loss curve
shows at once: the host cannot look at labels without waiting for the device. The sum is the online softmax of
Milakov and Gimelshein, 2018; the gradient in the forward pass and in place is Liger Kernel's (Hsu et al., 2024).
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow, tanh


@triton.jit
def _shaped(value, gain, cap, CAPPED: tl.constexpr):
    """z of a logit"""
    if CAPPED:
        return tanh(value * gain / cap) * cap
    else:
        return value * gain


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy(
    logits,
    labels,
    loss,
    lse,
    scale,
    factor,
    gain,
    cap,
    stride,
    vocab,
    ignore_index,
    COLS: tl.constexpr,
    CAPPED: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """FORWARD writes loss and (unless None) lse; BACKWARD turns the row into dlogits, and alone it reads lse.

    dlogits carry `factor`, a float, and `scale`, unless None: a float32 on the device, which the host never sees.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    at = logits + row * stride
    col = tl.arange(0, COLS)
    if label != ignore_index:
        if FORWARD:
            valid = (label >= 0) & (label < vocab)
            target = tl.load(at + label, mask=valid, other=float("nan")).to(tl.float32)
            target = _shaped(target, gain, cap, CAPPED)
            # Finite, so that a block of -inf alone gives exp(-inf) = 0 and not exp(-inf + inf) = NaN.
            peak = -3.0e38
            total = 0.0
            for start in range(0, vocab, COLS):
                inside = start + col < vocab
                value = tl.load(at + start + col, mask=inside, other=0.0).to(tl.float32)
                value = _shaped(value, gain, cap, CAPPED)
                value = tl.where(inside, value, -float("inf"))
                higher = tl.maximum(peak, tl.max(value, axis=0))
                total = total * tl.exp(peak - higher) + tl.sum(tl.exp(value - higher), axis=0)
                peak = higher
            log_sum = peak + tl.log(total)
            tl.store(loss + row, log_sum - target)
            if lse is not None:
                tl.store(lse + row, log_sum)
        else:
            log_sum = tl.load(lse + row)
        if BACKWARD:
            # The row is overwritten below: every warp must have read its target and its last block.
            tl.debug_barrier()
            if scale is not None:
                factor = factor * tl.load(scale)
            for start in range(0, vocab, COLS):
                inside = start + col < vocab
                value = tl.load(at + start + col, mask=inside, other=0.0).to(tl.float32)
                value = _shaped(value, gain, cap, CAPPED)
                softmax = tl.exp(tl.where(inside, value, -float("inf")) - log_sum)
                out = tl.where(start + col == label, softmax - 1.0, softmax) * (factor * gain)
                if CAPPED:
                    out = out * (1.0 - (value / cap) * (value / cap))
                tl.store(at + start + col, narrow(out, logits.dtype.element_ty), mask=inside)
    else:
        if FORWARD:
            tl.store(loss + row, 0.0)
            if lse is not None:
                tl.store(lse + row, 0.0)
        if BACKWARD:
            for start in range(0, vocab, COLS):
                zero = tl.zeros([COLS], dtype=tl.float32).to(logits.dtype.element_ty)
                tl.store(at + start + col, zero, mask=start + col < vocab)
