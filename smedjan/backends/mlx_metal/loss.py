"""Cross-entropy of a linear head, made chunk by chunk of rows so that the whole logits never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from smedjan.backends.mlx_metal.elementwise import wide
from smedjan.backends.mlx_metal.kernels import loss as kernels
from smedjan.backends.mlx_metal.kernels.common import has_metal
from smedjan.backends.mlx_metal.linear import rows as flat_rows
from smedjan.backends.mlx_metal.table import RULES

IGNORE = -100
CHUNK_LOGITS = 1 << 25
"""Logits alive at once: 128 MiB in float32."""


@RULES.rule("log_softmax")
def log_softmax(x: mx.array) -> mx.array:
    scores = wide(x)
    return (scores - mx.logsumexp(scores, axis=-1, keepdims=True)).astype(x.dtype)


@RULES.rule("log_softmax_bwd")
def log_softmax_bwd(dy: mx.array, y: mx.array) -> mx.array:
    cotangent = wide(dy)
    return (cotangent - mx.exp(wide(y)) * cotangent.sum(axis=-1, keepdims=True)).astype(dy.dtype)


def _picked(scores: mx.array, labels: mx.array) -> mx.array:
    """scores[i, labels[i]], zero where row i is not trained."""
    trained = labels != IGNORE
    index = mx.where(trained, labels, 0)[:, None]
    return mx.where(trained, mx.take_along_axis(scores, index, axis=-1)[:, 0], 0.0)


def _is_target(labels: mx.array, vocab_size: int) -> mx.array:
    """[N, V]: true at each row's label, nowhere for a row that is not trained."""
    return labels[:, None] == mx.arange(vocab_size, dtype=labels.dtype)[None]


@RULES.rule("nll_loss")
def nll_loss(log_probs: mx.array, labels: mx.array) -> mx.array:
    return (-_picked(wide(log_probs), labels).sum()).astype(log_probs.dtype)


@RULES.rule("nll_loss_bwd")
def nll_loss_bwd(dy: mx.array, log_probs: mx.array, labels: mx.array) -> mx.array:
    return mx.where(_is_target(labels, log_probs.shape[1]), -dy, mx.zeros((), dtype=dy.dtype)).astype(log_probs.dtype)


@RULES.rule("smooth_loss")
def smooth_loss(log_probs: mx.array, labels: mx.array) -> mx.array:
    rows = wide(log_probs).sum(axis=-1)
    return -mx.where(labels != IGNORE, rows, 0.0).sum().astype(log_probs.dtype)


@RULES.rule("smooth_loss_bwd")
def smooth_loss_bwd(dy: mx.array, log_probs: mx.array, labels: mx.array) -> mx.array:
    rows = mx.where(labels != IGNORE, -dy, mx.zeros((), dtype=dy.dtype))
    return mx.broadcast_to(rows[:, None], log_probs.shape).astype(log_probs.dtype)


@RULES.rule("pick")
def pick(x: mx.array, labels: mx.array) -> mx.array:
    return _picked(x, labels).astype(x.dtype)


@RULES.rule("pick_bwd")
def pick_bwd(dy: mx.array, labels: mx.array, *, size: int) -> mx.array:
    return mx.where(_is_target(labels, size), dy[:, None], mx.zeros((), dtype=dy.dtype))


@RULES.rule("sum_trained")
def sum_trained(x: mx.array, labels: mx.array) -> mx.array:
    return mx.where(_trained(labels, x), wide(x), 0.0).sum().astype(x.dtype)


@RULES.rule("sum_trained_bwd")
def sum_trained_bwd(dy: mx.array, x: mx.array, labels: mx.array) -> mx.array:
    return mx.where(_trained(labels, x), mx.broadcast_to(dy, x.shape), mx.zeros((), dtype=x.dtype))


def _trained(labels: mx.array, x: mx.array) -> mx.array:
    """[N, 1, ...], to broadcast over x [N, ...]: true where the row is trained."""
    return (labels != IGNORE).reshape(-1, *(1,) * (x.ndim - 1))


def _losses(
    logits: mx.array,
    labels: mx.array,
    num_items: mx.array,
    *,
    gradient: bool,
    factor: float,
    cap: float,
    z_loss: float,
    smoothing: float,
) -> tuple[mx.array, mx.array | None]:
    """The twin of `kernels/loss.py`'s `cross_entropy`: its formulas, arrays and dtypes."""
    scores, vocab_size = wide(logits) * factor, logits.shape[1]
    slope: float | mx.array = factor
    if cap:
        bent = mx.tanh(scores / cap)
        scores, slope = cap * bent, factor * (1 - mx.square(bent))
    lse = mx.logsumexp(scores, axis=-1)
    losses = lse - _picked(scores, labels) * (1.0 - smoothing)
    if smoothing:
        losses = losses - scores.mean(axis=-1) * smoothing
    if z_loss:
        losses = losses + mx.square(lse) * z_loss
    losses = mx.where(labels != IGNORE, losses, 0.0)
    if not gradient:
        return losses, None
    probs = mx.exp(scores - lse[:, None])
    if z_loss:
        probs = probs * (1.0 + 2.0 * z_loss * lse)[:, None]
    wrong = probs - _is_target(labels, vocab_size).astype(mx.float32) * (1.0 - smoothing)
    if smoothing:
        wrong = wrong - smoothing / vocab_size
    return losses, (mx.where((labels != IGNORE)[:, None], wrong, 0.0) * slope / num_items).astype(logits.dtype)


def _linear_cross_entropy(
    losses_of: Callable[..., tuple[mx.array, mx.array | None]],
    x: mx.array,
    weight: mx.array,
    labels: mx.array,
    num_items: mx.array,
    *,
    grads: str,
    scaling: float,
    divisor: float,
    **attrs: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients for a cotangent of one. dweight is summed over chunks in float32 and rounded once.

    `losses_of` gives a chunk's losses and dlogits: a kernel, or its twin.
    """
    flat, labels = flat_rows(x), labels.astype(mx.int32)
    step = max(1, CHUNK_LOGITS // weight.shape[0])
    total = mx.zeros((), dtype=mx.float32)
    dx_parts: list[mx.array] = []
    dweight = mx.zeros(weight.shape if "w" in grads else (0,), dtype=mx.float32)
    for start in range(0, flat.shape[0], step):
        part, targets = flat[start : start + step], labels[start : start + step]
        if start:
            # Without an order, the scheduler may keep several chunks of logits alive.
            part = mx.depends([part], [total, dweight, *dx_parts[-1:]])[0]
        losses, dlogits = losses_of(
            part @ weight.T, targets, num_items, gradient=bool(grads), factor=scaling / divisor, **attrs
        )
        total = total + losses.sum()
        if dlogits is None:
            continue
        if "x" in grads:
            dx_parts.append(dlogits @ weight)
        if "w" in grads:
            dweight = dweight + wide(dlogits.T @ part)
    dx = mx.concatenate(dx_parts).reshape(x.shape) if dx_parts else mx.zeros(x.shape if "x" in grads else (0,), x.dtype)
    return total / num_items, dx, dweight.astype(weight.dtype)


@RULES.rule("linear_cross_entropy", label="mlx, chunked rows")
def linear_cross_entropy(*arrays: mx.array, **attrs: Any) -> tuple[mx.array, mx.array, mx.array]:
    return _linear_cross_entropy(_losses, *arrays, **attrs)


@RULES.rule("linear_cross_entropy", label="mlx, chunked rows, metal cross_entropy", supports=has_metal)
def metal_linear_cross_entropy(*arrays: mx.array, **attrs: Any) -> tuple[mx.array, mx.array, mx.array]:
    return _linear_cross_entropy(kernels.cross_entropy, *arrays, **attrs)
