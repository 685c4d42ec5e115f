"""Cross-entropy of a linear head. Labels are shifted by the host: labels[i] is row i's target, -100 not trained."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.activation import softcap
from smedjan.ops.elementwise import cast, divide, divide_by, ones, reshape, scale, scale_by
from smedjan.ops.linear import linear


@op
def log_softmax(x: Tensor) -> Spec:
    """y = x - log sum exp(x), over the last dim"""
    return x.like()


@log_softmax.vjp
def _(dys, ins, outs, needs, acc):
    return (log_softmax_bwd(dys[0], outs.public[0]),)


@op
def log_softmax_bwd(dy: Tensor, y: Tensor) -> Spec:
    """dx = dy - exp(y) sum(dy)"""
    return dy.like()


@op
def nll_loss(log_probs: Tensor, labels: Tensor) -> Spec:
    """loss = -sum of log_probs[i, labels[i]] over rows whose label is not -100       log_probs [N, V], labels [N]"""
    require(log_probs.shape[:1] == labels.shape, f"nll_loss: {log_probs.shape} and labels {labels.shape}")
    return Spec((), log_probs.dtype)


@nll_loss.vjp
def _(dys, ins, outs, needs, acc):
    return (nll_loss_bwd(dys[0], *ins), None)


@op
def nll_loss_bwd(dy: Tensor, log_probs: Tensor, labels: Tensor) -> Spec:
    """dx[i, labels[i]] = -dy, zero elsewhere"""
    return log_probs.like()


def shape_logits(logits: Tensor, *, scaling: float = 1.0, divisor: float = 1.0, cap: float = 0.0) -> Tensor:
    """cap tanh(scaling * logits / divisor / cap), in the logits' dtype; a step with a neutral constant is not made."""
    if scaling != 1.0:
        logits = scale(logits, factor=scaling)
    if divisor != 1.0:
        logits = divide(logits, divisor=divisor)
    return softcap(logits, cap) if cap else logits


def _head_flops(node) -> int:
    x, weight = node.inputs[0], node.inputs[1]
    return 2 * x.numel * weight.shape[0] * (1 + len(node.attrs["grads"]))


@op(saves=("dx", "dweight"), cost=_head_flops)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor,
    *,
    grads: str = "",
    scaling: float = 1.0,
    divisor: float = 1.0,
    cap: float = 0.0,
) -> tuple[Spec, Spec, Spec]:
    """loss = sum over trained rows of (log sum exp(z) - z[label]) / num_items,  z = shape_logits(W x)

    x [N, D] or [B, T, D], weight [V, D], labels [N], num_items float32 scalar -> loss float32. Logits are made in x's
    dtype, the softmax in float32. A fused lowering never holds all logits: it makes the gradients that `grads` names
    ("x", "w") chunk by chunk in the forward, for a cotangent of one, and saves them (Hsu et al. 2024, section 3.2).
    """
    require(weight.shape[1] == x.shape[-1], f"linear_cross_entropy: weight {weight.shape} for x {x.shape}")
    return (
        Spec((), "float32"),
        x.like() if "x" in grads else x.like(shape=(0,)),
        weight.like() if "w" in grads else weight.like(shape=(0,)),
    )


@linear_cross_entropy.decompose
def _(x, weight, labels, num_items, *, grads, **shaping):
    logits = cast(shape_logits(linear(x, weight), **shaping), "float32")
    flat = reshape(logits, shape=(labels.numel, weight.shape[0])) if logits.ndim != 2 else logits
    return divide_by(nll_loss(log_softmax(flat), labels), num_items)


@linear_cross_entropy.vjp
def _(dys, ins, outs, needs, acc, *, grads, **shaping):
    one = dys[0].node.op is ones
    made = []
    for need, name, saved in zip(needs[:2], "xw", outs.saved, strict=True):
        require(not need or name in grads, f"linear_cross_entropy was built without the gradient of {name}")
        made.append((saved if one else scale_by(saved, dys[0])) if need else None)
    return (*made, None, None)
