"""One parameter's step of each optimizer besides AdamW, in one dtype, and the mean of weights.

Each updates the parameter and its moments in place; `grad_scale`, a scalar or None, multiplies the gradient first: a
clip folded in. Where `norm`, a scalar, is not finite, nothing changes. `lr` and `beta2t` are host scalars.

    A [..], g: the parameter's shape, [M, N] where it is a matrix
"""

from __future__ import annotations

from math import inf, sqrt

from smedjan.graph.op import Pairs, op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import (
    add,
    add_scalar,
    cast,
    clamp,
    div,
    divide,
    divide_by,
    mul,
    reshape,
    rsqrt,
    scale,
    scale_by,
    sign,
    square,
    sub,
    sum_to,
)
from smedjan.ops.linear import linear, linear_dw, linear_dx_add
from smedjan.ops.optimizer import global_norm, keep

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al. 2024, whose slope at zero is as steep as can be; torch.optim.Muon has them too."""

ITERATIONS = 5
MUON_EPS = 1e-7
ADAFACTOR_EPS = 1e-30
SOPHIA_EPS = 1e-15


def _first(count: int) -> Pairs:
    """The parameter and its moments, which are inputs 0, 2, 3, ..., in their own buffers."""
    return tuple((index, index + (index > 0)) for index in range(count))


def _scaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    return grad if grad_scale is None else scale_by(grad, grad_scale)


def _between(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """(1 - weight) a + weight b"""
    return add(scale(a, factor=1 - weight), scale(b, factor=weight))


def _decayed(param: Tensor, lr: Tensor, weight_decay: float) -> Tensor:
    return param if weight_decay == 0 else sub(param, scale_by(scale(param, factor=weight_decay), lr))


@op(donates=lambda node: _first(2), cost=lambda node: 9 * node.inputs[0].numel)
def lion_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    lr: Tensor,
    norm: Tensor,
    grad_scale: Tensor | None = None,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[Spec, Spec]:
    """Lion (Chen et al. 2023, algorithm 2):  p -= lr wd p;  p -= lr sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g"""
    require(param.spec == grad.spec == exp_avg.spec, f"lion_update: {param} {grad} {exp_avg}")
    return param.like(), exp_avg.like()


@lion_update.decompose
def _(param, grad, exp_avg, lr, norm, grad_scale, *, beta1, beta2, weight_decay):
    grad = _scaled(grad, grad_scale)
    moved = sub(_decayed(param, lr, weight_decay), scale_by(sign(_between(exp_avg, grad, 1 - beta1)), lr))
    moment = _between(exp_avg, grad, 1 - beta2)
    return keep(moved, param, norm), keep(moment, exp_avg, norm)


def orthogonal(x: Tensor) -> Tensor:
    """y ~ U V^T of x = U S V^T [M, N]: singular values between about 0.7 and 1.2 (Jordan et al. 2024).

    X = x / |x|, then five times, with the smaller side first:  A = X X^T;  X = a X + (b A + c A A) X, in bfloat16. Of
    s X, s^4 = c, that has no factor before A A: each sum is a product onto what is there, one rounding.
    """
    a, b, c = NEWTON_SCHULZ
    stretch, tall = c**0.25, x.shape[0] > x.shape[1]
    length = scale(clamp(global_norm(x), low=MUON_EPS, high=inf), factor=1 / stretch)
    y = cast(divide_by(x, length), "bfloat16")
    for _ in range(ITERATIONS):
        # Of a tall matrix the Gram matrix is X^T X; it is symmetric, so that no product needs a transpose.
        gram = linear_dw(y, y) if tall else linear(y, y)
        update = linear_dx_add(scale(gram, factor=b / stretch**2), gram, gram)
        y = linear_dx_add(scale(y, factor=a), *((y, update) if tall else (update, y)))
    return divide(cast(y, x.dtype), divisor=stretch)


@op(
    donates=lambda node: _first(2),
    cost=lambda node: (
        9 * node.inputs[0].numel
        + ITERATIONS * (4 * node.inputs[0].numel * min(node.inputs[0].shape) + 2 * min(node.inputs[0].shape) ** 3)
    ),
)
def muon_update(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: Tensor,
    norm: Tensor,
    grad_scale: Tensor | None = None,
    *,
    momentum: float,
    ratio: float,
    weight_decay: float,
) -> tuple[Spec, Spec]:
    """Muon (Jordan et al. 2024), as torch.optim.Muon:  B = mu B + (1 - mu) g;  u = (1 - mu) g + mu B (Nesterov)

    p -= lr wd p;  p -= lr ratio orthogonal(u), all but that function in the parameter's dtype
    """
    require(param.ndim == 2 and param.spec == grad.spec == momentum_buffer.spec, f"muon_update: {param} {grad}")
    return param.like(), momentum_buffer.like()


@muon_update.decompose
def _(param, grad, momentum_buffer, lr, norm, grad_scale, *, momentum, ratio, weight_decay):
    grad = _scaled(grad, grad_scale)
    moment = _between(momentum_buffer, grad, 1 - momentum)
    step = orthogonal(_between(grad, moment, momentum))
    moved = sub(_decayed(param, lr, weight_decay), scale_by(scale(step, factor=ratio), lr))
    return keep(moved, param, norm), keep(moment, momentum_buffer, norm)


@op(
    donates=lambda node: _first(3 if node.inputs[3] is not None else 2),
    cost=lambda node: 16 * node.inputs[0].numel,
)
def adafactor_update(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor | None,
    lr: Tensor,
    beta2t: Tensor,
    norm: Tensor,
    grad_scale: Tensor | None = None,
    *,
    threshold: float,
    weight_decay: float,
) -> tuple[Spec, ...]:
    """Adafactor (Shazeer & Stern 2018, algorithms 4 and 5 without a relative step), as transformers' class: float32.

    q = g^2 + 1e-30;  R = b R + (1 - b) mean of q's rows;  C likewise of its columns;  V = R C^T / mean(R)
    u = g / sqrt(V);  u /= max(1, rms(u) / threshold);  p -= lr wd p;  p -= lr u
    first [..., M], second [..., N]: R and C of a matrix [..., M, N]. Of a vector first is V itself, second None.
    """
    rows, cols = (param.shape, None) if second is None else (param.shape[:-1], (*param.shape[:-2], param.shape[-1]))
    require(param.shape == grad.shape, f"adafactor_update: {param} {grad}")
    require(first.shape == rows and (second is None or second.shape == cols), f"adafactor_update: {first} {second}")
    return (param.like(), first.like(), *(() if second is None else (second.like(),)))


@adafactor_update.decompose
def _(param, grad, first, second, lr, beta2t, norm, grad_scale, *, threshold, weight_decay):
    grad = _scaled(grad, grad_scale)
    squares = add_scalar(square(grad), value=ADAFACTOR_EPS)

    def averaged(old: Tensor, new: Tensor) -> Tensor:
        # b old + (1 - b) new, of a scalar that the host gives
        return add(new, scale_by(sub(old, new), beta2t))

    if second is None:
        moments = [(averaged(first, squares), first)]
        step = mul(rsqrt(moments[0][0]), grad)
    else:
        *lead, rows, cols = grad.shape
        means = [divide(sum_to(squares, shape=(*lead, rows, 1)), divisor=cols)]
        means += [divide(sum_to(squares, shape=(*lead, 1, cols)), divisor=rows)]
        moments = [
            (averaged(old, reshape(mean, shape=old.shape)), old)
            for old, mean in zip((first, second), means, strict=True)
        ]
        row = reshape(moments[0][0], shape=(*lead, rows, 1))
        share = div(row, divide(sum_to(row, shape=(*lead, 1, 1)), divisor=rows))
        col = reshape(moments[1][0], shape=(*lead, 1, cols))
        step = mul(mul(rsqrt(share), rsqrt(col)), grad)
    rms = divide(global_norm(step), divisor=sqrt(step.numel))
    step = divide_by(step, clamp(divide(rms, divisor=threshold), low=1.0, high=inf))
    moved = sub(_decayed(param, lr, weight_decay), scale_by(step, lr))
    return keep(moved, param, norm), *(keep(new, old, norm) for new, old in moments)


@op(donates=lambda node: _first(3)[:2], cost=lambda node: 10 * node.inputs[0].numel)
def sophia_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    hessian: Tensor,
    lr: Tensor,
    norm: Tensor,
    grad_scale: Tensor | None = None,
    *,
    beta1: float,
    rho: float,
    weight_decay: float,
) -> tuple[Spec, Spec]:
    """Sophia (Liu et al. 2023, algorithm 3) under a given diagonal h of the Hessian, which it does not change.

    p -= lr wd p;  m = b1 m + (1 - b1) g;  p -= lr clamp(m / (rho h + 1e-15), -1, 1)
    """
    require(param.spec == grad.spec == exp_avg.spec == hessian.spec, f"sophia_update: {param} {grad} {exp_avg}")
    return param.like(), exp_avg.like()


@sophia_update.decompose
def _(param, grad, exp_avg, hessian, lr, norm, grad_scale, *, beta1, rho, weight_decay):
    moment = _between(exp_avg, _scaled(grad, grad_scale), 1 - beta1)
    ratio = div(moment, add_scalar(scale(hessian, factor=rho), value=SOPHIA_EPS))
    moved = sub(_decayed(param, lr, weight_decay), scale_by(clamp(ratio, low=-1.0, high=1.0), lr))
    return keep(moved, param, norm), keep(moment, exp_avg, norm)


@op(donates=0, cost=lambda node: 4 * node.inputs[0].numel)
def hessian_update(hessian: Tensor, grad: Tensor, count: Tensor, norm: Tensor, *, beta2: float) -> Spec:
    """h = b2 h + (1 - b2) B g^2, the Gauss-Newton-Bartlett estimate (Liu et al. 2023, algorithm 2)

    g is the gradient of the mean loss of B tokens whose labels were drawn from the model's distribution; count is B.
    """
    require(hessian.shape == grad.shape, f"hessian_update: {hessian} {grad}")
    return hessian.like()


@hessian_update.decompose
def _(hessian, grad, count, norm, *, beta2):
    squares = scale_by(square(cast(grad, hessian.dtype)), count)
    return keep(_between(hessian, squares, 1 - beta2), hessian, norm)


@op(donates=0, cost=lambda node: 3 * node.inputs[0].numel)
def average_update(average: Tensor, param: Tensor, norm: Tensor, *, decay: float) -> Spec:
    """a += (1 - decay) (p - a), float32: an exponential mean of a parameter over the steps"""
    require(average.shape == param.shape and average.dtype == "float32", f"average_update: {average} {param}")
    return average.like()


@average_update.decompose
def _(average, param, norm, *, decay):
    difference = sub(cast(param, "float32"), average)
    return keep(add(average, scale(difference, factor=1 - decay)), average, norm)
