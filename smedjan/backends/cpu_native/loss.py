"""The head's cross-entropy over trained rows alone, a chunk of logits at a time, gradients made in the forward."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native.table import RULES

CHUNK_ROWS = 256
"""Rows of logits held at once: 50 MB in float32 for a vocabulary of 49,152."""


@RULES.rule("linear_cross_entropy", label="cpu_native fused head")
def linear_cross_entropy(x, weight, labels, num_items, *, grads, scaling, divisor, cap, z_loss, smoothing):
    """dz = p (1 + 2 z_loss lse) - (1 - smoothing) onehot(label) - smoothing / V"""
    rows = x.reshape(-1, x.shape[-1])
    factor = scaling / divisor
    total = torch.zeros((), dtype=torch.float32)
    dx = torch.empty_like(rows) if "x" in grads else rows.new_empty((0,))
    dweight = torch.zeros(weight.shape, dtype=torch.float32) if "w" in grads else None
    for start in range(0, len(rows), CHUNK_ROWS):
        part, target = rows[start : start + CHUNK_ROWS], labels[start : start + CHUNK_ROWS]
        trained = target != -100
        logits = (part @ weight.t()).float()
        if factor != 1.0:
            logits.mul_(factor)
        capped = torch.tanh(logits.div_(cap)) if cap else None
        scores = logits if capped is None else capped * cap
        log_probs = torch.log_softmax(scores, -1)
        index = target.clamp(min=0).unsqueeze(-1)
        picked = log_probs.gather(-1, index)
        total -= picked[trained].sum() * (1.0 - smoothing)
        if smoothing:
            total -= log_probs.sum(-1)[trained].sum() * (smoothing / len(weight))
        lse = scores.gather(-1, index) - picked if z_loss else None  # z[v] - log p[v] of any v
        if lse is not None:
            total += lse[trained].square().sum() * z_loss
        if not grads:
            continue
        dlogits = log_probs.exp_()
        if lse is not None:
            dlogits.mul_(lse.mul_(2.0 * z_loss).add_(1.0))
        if smoothing:
            dlogits.sub_(smoothing / len(weight))
        dlogits.scatter_add_(-1, index, dlogits.new_full(index.shape, smoothing - 1.0))
        dlogits.mul_(trained.unsqueeze(-1) * factor / num_items)
        if capped is not None:
            dlogits.mul_(capped.square_().neg_().add_(1.0))
        narrow = dlogits.to(weight.dtype)
        if "x" in grads:
            torch.mm(narrow, weight, out=dx[start : start + CHUNK_ROWS])
        if dweight is not None:
            dweight.addmm_(dlogits.t(), part.float())
    dx = dx.reshape(x.shape) if "x" in grads else dx
    return total / num_items, dx, weight.new_empty((0,)) if dweight is None else dweight.to(weight.dtype)
