"""AdamW's update in place, and the two stages of a gradient's global norm.

    g = grad * grad_scale;  p = p * (1 - lr * weight_decay)
    m = m + (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    p = p - lr / bias_correction1 * m / (sqrt(v) / sqrt(bias_correction2) + eps)

torch.optim.AdamW's single-tensor formula and order (decay first), in float32, with correctly rounded square root and
division: the kernel waits for memory, 16 bytes read and 12 written a float32 value, so that accuracy costs no time.
Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
"""

import triton
import triton.language as tl

from smedjan.backends.cuda_triton.kernels.common import narrow


@triton.jit
def adamw(
    param,
    master,
    grad,
    exp_avg,
    exp_avg_sq,
    grad_scale,
    numel,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    root_correction2,
    step_size,
    eps,
    COLS: tl.constexpr,
):
    """COLS values. `master` (None: `param` is its own) is the float32 copy that is updated; `param` is its rounding."""
    index = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = index < numel
    g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    if grad_scale is not None:
        g = g * tl.load(grad_scale)
    m = tl.load(exp_avg + index, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + index, mask=inside, other=0.0).to(tl.float32)
    if master is not None:
        p = tl.load(master + index, mask=inside, other=0.0)
    else:
        p = tl.load(param + index, mask=inside, other=0.0).to(tl.float32)

    p = p * decay
    # torch's lerp: from the nearer end.
    if one_minus_beta1 < 0.5:
        m = m + one_minus_beta1 * (g - m)
    else:
        m = g - (g - m) * (1.0 - one_minus_beta1)
    v = v * beta2 + one_minus_beta2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction2) + eps
    p = p - step_size * tl.div_rn(m, denominator)

    tl.store(exp_avg + index, narrow(m, exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + index, narrow(v, exp_avg_sq.dtype.element_ty), mask=inside)
    tl.store(param + index, narrow(p, param.dtype.element_ty), mask=inside)
    if master is not None:
        tl.store(master + index, p, mask=inside)


@triton.jit(do_not_specialize=["first"])
def square_sum(grad, partial, numel, first, COLS: tl.constexpr):
    """partial[first + program] = the sum of squares of this program's share of a gradient."""
    total = tl.zeros([COLS], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(numel, COLS), tl.num_programs(0)):
        index = block * COLS + tl.arange(0, COLS).to(tl.int64)
        value = tl.load(grad + index, mask=index < numel, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + first + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def root_of_sum(partial, out, count, COLS: tl.constexpr):
    """out = sqrt(sum of partial[:count]), by one program, always in the same order."""
    total = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, count, COLS):
        index = start + tl.arange(0, COLS)
        total += tl.load(partial + index, mask=index < count, other=0.0)
    tl.store(out, tl.sqrt_rn(tl.sum(total, axis=0)))
