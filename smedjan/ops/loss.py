"""Losses of a linear head: cross-entropy, distillation, log-probabilities. Labels are shifted by the host: labels[i] is
row i's target, -100 where the row is not trained.

A fused lowering of a head never holds all logits [N, V]: it makes and spends them a chunk of rows at a time.
"""

from __future__ import annotations

from smedjan.graph.op import Op, op, require
from smedjan.graph.rewrite import backward_by_decomposition
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.activation import softcap
from smedjan.ops.attention import softmax
from smedjan.ops.elementwise import add, cast, divide, divide_by, mul, ones, reshape, scale, scale_by, square, sub
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


@op
def smooth_loss(log_probs: Tensor, labels: Tensor) -> Spec:
    """loss = -sum over rows whose label is not -100 of the row's sum of log_probs       log_probs [N, V], labels [N]

    Over V: the cross-entropy of a uniform target, label smoothing's other term (Szegedy et al. 2016, section 7).
    """
    require(log_probs.shape[:1] == labels.shape, f"smooth_loss: {log_probs.shape} and labels {labels.shape}")
    return Spec((), log_probs.dtype)


@smooth_loss.vjp
def _(dys, ins, outs, needs, acc):
    return smooth_loss_bwd(dys[0], *ins), None


@op
def smooth_loss_bwd(dy: Tensor, log_probs: Tensor, labels: Tensor) -> Spec:
    """dx[i, :] = -dy where labels[i] is not -100, else 0"""
    return log_probs.like()


@op
def pick(x: Tensor, labels: Tensor) -> Spec:
    """y[i] = x[i, labels[i]], 0 where the label is -100       x [N, V], labels [N] -> y [N]"""
    require(x.ndim == 2 and x.shape[:1] == labels.shape, f"pick: {x.shape} and labels {labels.shape}")
    return x.like(shape=labels.shape)


@pick.vjp
def _(dys, ins, outs, needs, acc):
    return (pick_bwd(dys[0], ins[1], size=ins[0].shape[1]), None)


@op
def pick_bwd(dy: Tensor, labels: Tensor, *, size: int) -> Spec:
    """dx[i, labels[i]] = dy[i], zero elsewhere       dy [N] -> dx [N, size]"""
    return dy.like(shape=(*dy.shape, size))


@op
def sum_trained(x: Tensor, labels: Tensor) -> Spec:
    """y = sum of the rows of x whose label is not -100       x [N, ...], labels [N] -> y []"""
    require(x.shape[:1] == labels.shape, f"sum_trained: {x.shape} and labels {labels.shape}")
    return x.like(shape=())


@sum_trained.vjp
def _(dys, ins, outs, needs, acc):
    return (sum_trained_bwd(dys[0], *ins), None)


@op
def sum_trained_bwd(dy: Tensor, x: Tensor, labels: Tensor) -> Spec:
    """dx[i, ...] = dy where labels[i] is not -100, else 0"""
    return x.like()


def shape_logits(logits: Tensor, *, scaling: float = 1.0, divisor: float = 1.0, cap: float = 0.0) -> Tensor:
    """cap tanh(scaling * logits / divisor / cap), in the logits' dtype; a step with a neutral constant is not made."""
    if scaling != 1.0:
        logits = scale(logits, factor=scaling)
    if divisor != 1.0:
        logits = divide(logits, divisor=divisor)
    return softcap(logits, cap) if cap else logits


def _logits(x: Tensor, weight: Tensor, rows: int, **shaping: float) -> Tensor:
    """shape_logits(W x), made in x's dtype and widened to float32: [rows, V]"""
    logits = cast(shape_logits(linear(x, weight), **shaping), "float32")
    return reshape(logits, shape=(rows, weight.shape[0])) if logits.ndim != 2 else logits


def _saved(x: Tensor, weight: Tensor, grads: str) -> tuple[Spec, Spec]:
    """dx and dweight where `grads` names them, else empty."""
    return (
        x.like() if "x" in grads else x.like(shape=(0,)),
        weight.like() if "w" in grads else weight.like(shape=(0,)),
    )


def _scaled(op: Op, dy: Tensor, saved: tuple[Tensor, ...], needs: tuple[bool, ...], grads: str) -> list[Tensor | None]:
    """The gradients that the forward saved, for a cotangent of one, times the cotangent that came."""
    one = dy.node.op is ones
    made = []
    for need, name, gradient in zip(needs, "xw", saved, strict=True):
        require(not need or name in grads, f"{op.name} was built without the gradient of {name}")
        made.append((gradient if one else scale_by(gradient, dy)) if need else None)
    return made


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
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[Spec, Spec, Spec]:
    """loss = sum over trained rows of (lse - (1 - e) z[label] - e mean(z) + z_loss lse^2) / num_items,
    z = shape_logits(W x), lse = log sum exp(z), e = smoothing

    x [N, D] or [B, T, D], weight [V, D], labels [N], num_items float32 scalar -> loss float32. Logits are made in x's
    dtype, the softmax in float32. A fused lowering never holds all logits: it makes the gradients that `grads` names
    ("x", "w") chunk by chunk in the forward, for a cotangent of one, and saves them (Hsu et al. 2024, section 3.2).
    The term in lse^2 keeps softmax's normaliser near one (Chowdhery et al. 2022, section 5). The target of label
    smoothing is 1 - e at the label and e / V everywhere (torch.nn.functional.cross_entropy's label_smoothing).
    """
    require(weight.shape[1] == x.shape[-1], f"linear_cross_entropy: weight {weight.shape} for x {x.shape}")
    require(0.0 <= smoothing < 1.0, f"linear_cross_entropy: smoothing {smoothing}")
    return (Spec((), "float32"), *_saved(x, weight, grads))


@linear_cross_entropy.decompose
def _(x, weight, labels, num_items, *, grads, z_loss, smoothing, **shaping):
    flat = _logits(x, weight, labels.numel, **shaping)
    log_probs = log_softmax(flat)
    total = nll_loss(log_probs, labels)
    if smoothing:
        # In the order of ATen's cross_entropy_loss_label_smoothing, whose bits these are.
        spread = smooth_loss(log_probs, labels)
        total = add(scale(total, factor=1.0 - smoothing), scale(spread, factor=smoothing / flat.shape[1]))
    if z_loss:
        # lse = z[v] - log p[v] of any v: the label's serves, and is 0 - 0 where the row is not trained.
        lse = sub(pick(flat, labels), pick(log_probs, labels))
        total = add(total, scale(sum_trained(square(lse), labels), factor=z_loss))
    return divide_by(total, num_items)


@linear_cross_entropy.vjp
def _(dys, ins, outs, needs, acc, *, grads, **shaping):
    return (*_scaled(linear_cross_entropy, dys[0], outs.saved, needs[:2], grads), None, None)


def _distillation_flops(node) -> int:
    teacher_x, teacher_weight = node.inputs[2], node.inputs[3]
    return _head_flops(node) + 2 * teacher_x.numel * teacher_weight.shape[0]


@op(saves=("dx", "dweight"), cost=_distillation_flops)
def linear_kl(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    num_items: Tensor,
    *,
    grads: str = "",
    direction: str = "forward",
    temperature: float = 1.0,
    scaling: float = 1.0,
    divisor: float = 1.0,
    cap: float = 0.0,
    teacher_scaling: float = 1.0,
    teacher_divisor: float = 1.0,
    teacher_cap: float = 0.0,
) -> tuple[Spec, Spec, Spec]:
    """loss = T^2 sum over trained rows of KL(p || q) / num_items,  q = softmax(z / T), p = softmax(z_teacher / T)

    x [N, D] or [B, T, D], weight [V, D], teacher_x [N, D'] or [B, T, D'], teacher_weight [V, D'], labels [N] (which say
    which rows count, no more), num_items float32 scalar -> loss float32. z = shape_logits(W x), each with constants of
    its own; T^2 keeps the gradient's size as the temperature T changes (Hinton et al. 2015, section 2). With direction
    "reverse", KL(q || p), which does not ask the student to cover what it cannot (Gu et al. 2024, eq. 1). The teacher
    is not differentiated. Gradients are made in the forward and saved, as those of `linear_cross_entropy`.
    """
    require(weight.shape[1] == x.shape[-1], f"linear_kl: weight {weight.shape} for x {x.shape}")
    require(teacher_weight.shape[1] == teacher_x.shape[-1], f"linear_kl: {teacher_weight.shape} for {teacher_x.shape}")
    require(weight.shape[0] == teacher_weight.shape[0], f"linear_kl: {weight.shape[0]} and {teacher_weight.shape[0]}")
    require(x.shape[:-1] == teacher_x.shape[:-1], f"linear_kl: x {x.shape}, the teacher's {teacher_x.shape}")
    require(direction in ("forward", "reverse"), f"linear_kl: direction {direction!r}")
    return (Spec((), "float32"), *_saved(x, weight, grads))


@linear_kl.decompose
def _(
    x, weight, teacher_x, teacher_weight, labels, num_items, *, grads, direction, temperature, scaling, divisor, cap,
    teacher_scaling, teacher_divisor, teacher_cap,
):  # fmt: skip
    z = _logits(x, weight, labels.numel, scaling=scaling, divisor=divisor, cap=cap)
    z_teacher = _logits(
        teacher_x, teacher_weight, labels.numel, scaling=teacher_scaling, divisor=teacher_divisor, cap=teacher_cap
    )
    if temperature != 1.0:
        z, z_teacher = divide(z, divisor=temperature), divide(z_teacher, divisor=temperature)
    of, beside = (z_teacher, z) if direction == "forward" else (z, z_teacher)
    terms = mul(softmax(of), sub(log_softmax(of), log_softmax(beside)))
    return divide_by(scale(sum_trained(terms, labels), factor=temperature**2), num_items)


@linear_kl.vjp
def _(dys, ins, outs, needs, acc, *, grads, **attrs):
    require(not needs[2] and not needs[3], "linear_kl does not differentiate its teacher")
    return (*_scaled(linear_kl, dys[0], outs.saved, needs[:2], grads), None, None, None, None)


GRADIENTS_IN_FORWARD = (linear_cross_entropy, linear_kl)
"""Their VJP scales what the forward saved; where no rule does, they are decomposed before they are differentiated."""


@op(saves=("lse",), cost=lambda node: 2 * node.inputs[0].numel * node.inputs[1].shape[0])
def linear_log_probs(
    x: Tensor, weight: Tensor, labels: Tensor, *, scaling: float = 1.0, divisor: float = 1.0, cap: float = 0.0
) -> tuple[Spec, Spec]:
    """y[i] = z[i, labels[i]] - log sum exp(z[i]), 0 where the label is -100;  z = shape_logits(W x)

    x [N, D] or [B, T, D], weight [V, D], labels [N] -> y [N] float32: the head of methods that weigh sequences against
    each other (Rafailov et al. 2023, eq. 7). Saves lse [N, 2], float32, as two terms: the largest z, and the log of the
    sum of exp(z - largest).
    """
    require(weight.shape[1] == x.shape[-1], f"linear_log_probs: weight {weight.shape} for x {x.shape}")
    return Spec(labels.shape, "float32"), Spec((*labels.shape, 2), "float32")


@linear_log_probs.decompose
def _(x, weight, labels, **shaping):
    return pick(log_softmax(_logits(x, weight, labels.numel, **shaping)), labels)


@linear_log_probs.vjp
def _(dys, ins, outs, needs, acc, **shaping):
    made = linear_log_probs_bwd(dys[0], *ins, outs.saved[0], needs=needs[:2], **shaping)
    found = iter(made if isinstance(made, tuple) else (made,))
    return (*(next(found) if need else None for need in needs[:2]), None)


@op(cost=lambda node: 2 * node.inputs[1].numel * node.inputs[2].shape[0] * (1 + sum(node.attrs["needs"])))
def linear_log_probs_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    *,
    needs: tuple[bool, bool],
    scaling: float,
    divisor: float,
    cap: float,
) -> tuple[Spec, ...]:
    """dz = (onehot(label) - exp(z - lse)) dy;  dx = dz W, dW = dz^T x, through `shape_logits`

    Logits are made again, chunk by chunk. Gives the gradients that `needs` names, in the inputs' order.
    """
    return tuple(t.like() for t, need in zip((x, weight), needs, strict=True) if need)


backward_by_decomposition(
    linear_log_probs_bwd,
    linear_log_probs,
    lambda dy, x, weight, labels, lse, *, needs, **shaping: (
        (x, weight, labels),
        shaping,
        (dy,),
        (*needs, False),
        (None,) * 3,
    ),
)
