"""The update: gradient accumulation, global norm, clip and AdamW, all on the device."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor


@op(donates=0)
def accumulate(total: Tensor, grad: Tensor) -> Spec:
    """total += grad, in total's dtype"""
    require(total.shape == grad.shape, f"accumulate: {total.shape} and {grad.shape}")
    return total.like()


@op(cost=lambda node: 2 * sum(t.numel for t in node.inputs))
def global_norm(*grads: Tensor) -> Spec:
    """y = sqrt(sum of squares over every element of every gradient), as a norm of norms; float32 or the grads' dtype"""
    return Spec((), grads[0].dtype)


@op
def clip_coefficient(norm: Tensor, *, max_norm: float) -> Spec:
    """y = min(1, max_norm / (norm + 1e-6))"""
    return norm.like()


@op(donates=0, cost=lambda node: 12 * node.inputs[0].numel)
def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor | None = None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Spec, Spec, Spec]:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), updating param, exp_avg and exp_avg_sq in place.

    p -= lr wd p;  m += (1 - b1)(g - m);  v = b2 v + (1 - b2) g^2
    p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
    with g = grad * grad_scale (the clip's coefficient). lr (float) and step = t (integer, from 1) are host scalars.
    """
    require(param.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape, f"adamw_update: {param} {grad}")
    return param.like(), exp_avg.like(), exp_avg_sq.like()
