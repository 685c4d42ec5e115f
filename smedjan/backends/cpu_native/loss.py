"""The head's cross-entropy over trained rows alone, a chunk of logits at a time, gradients made in the forward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from smedjan.backends.cpu_native.native.team import call, step
from smedjan.backends.cpu_native.products import ATEN, BFLOAT16, MAKERS, Maker, floats
from smedjan.backends.cpu_native.table import DTYPES, PLANNED, RULES, compiled
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows
from smedjan.graph.lowering import Supports
from smedjan.graph.node import Node

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


# Of plans: a chunk of logits becomes its gradient where it lies. Formulas in native/src/loss_rows.c.


def _rising(node: Node) -> bool:
    """A gain above zero: the largest logit is the largest z."""
    return node.attrs["scaling"] / node.attrs["divisor"] > 0.0 and compiled(node)


def _made_by(maker: Maker) -> Supports:
    def supports(node: Node) -> bool:
        x, weight, labels, _ = node.inputs
        assert labels is not None
        assert weight is not None
        sizes = [(labels.numel, weight.shape[0], weight.shape[1])]
        return _rising(node) and maker.takes(floats((x, weight)), sizes)

    return supports


def _chunk(count: int, hidden: int, grads: str, maker: Maker) -> int:
    """Rows of logits at a time; more where each chunk puts a float32 weight in tiles anew. Where the weight's gradient
    is made on tiles from bfloat16, all rows, if they take no more memory than CHUNK_ROWS beside a float32 total of that
    gradient; else more at a time, since each adds to the total."""
    if maker is ATEN or (maker is BFLOAT16 and "w" not in grads):
        return CHUNK_ROWS
    return count if maker is BFLOAT16 and count <= CHUNK_ROWS + 2 * hidden else 2 * CHUNK_ROWS


def _widened(node: Node) -> int:
    """A chunk's logits and rows in the dtype of the weight's total, where that is another: float32."""
    x, weight, labels, _ = node.inputs
    assert x is not None
    assert weight is not None
    assert labels is not None
    if "w" not in node.attrs["grads"] or x.dtype == "float32" or labels.numel <= CHUNK_ROWS:
        return 0
    return CHUNK_ROWS * (weight.shape[0] + weight.shape[1]) * 4


def planned_cross_entropy(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    grads: str,
    scaling: float,
    divisor: float,
    cap: float,
    z_loss: float,
    smoothing: float,
    maker: Maker,
) -> None:
    x, weight, labels, num_items = ins
    loss, dx, dweight = outs
    dx, dweight = dx if "x" in grads else None, dweight if "w" in grads else None
    rows, count, vocab = as_rows(x), labels.shape[0], weight.shape[0]
    chunk, product = _chunk(count, weight.shape[1], grads, maker), maker.product
    logits = run.scratch((min(count, chunk), vocab), x.dtype)
    losses = run.scratch((max(count, 1),), torch.float32)
    total = dweight
    if dweight is not None and dweight.dtype != torch.float32 and count > chunk:
        total = run.scratch(tuple(weight.shape), torch.float32)  # the sum over chunks is rounded once
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        made = logits[: part.stop - start]
        product(run, rows[part], weight.t(), made)
        entropy = step(
            f"cross_entropy_{DTYPES[x.dtype]}",
            (made, labels[part], num_items, losses[part]),
            (*made.shape, made.stride(0), int(bool(grads))),
            (scaling / divisor, cap, z_loss, smoothing),
        )
        call(run, "cross_entropy", entropy)
        if dx is not None:
            product(run, made, weight, as_rows(dx)[part])
        if total is not None and maker is ATEN:
            run.library("aten mm", _outer, total, made, rows[part], start > 0)
        elif total is not None:
            product(run, made.t(), rows[part], total, plus=total if start else None)
    if total is not dweight:
        run.library("aten copy", Tensor.copy_, dweight, total)
    if loss is not None:
        run.library("aten sum", _mean, losses[:count], num_items, loss)


for each in MAKERS:
    PLANNED.kernel(
        "linear_cross_entropy",
        label=f"native cross_entropy + {each.label.removeprefix('native ')}",
        supports=_made_by(each),
        temporaries=_widened if each is ATEN else None,
    )(partial(planned_cross_entropy, maker=each))


def _outer(total: Tensor, dlogits: Tensor, x: Tensor, add: bool) -> None:
    """total (+)= dlogits^T x, in total's dtype"""
    a, b = dlogits.t(), x
    if a.dtype != total.dtype:
        a, b = a.to(total.dtype), b.to(total.dtype)
    if add:
        total.addmm_(a, b)
    else:
        torch.mm(a, b, out=total)


def _mean(losses: Tensor, num_items: Tensor, loss: Tensor) -> None:
    loss.copy_(losses.sum() / num_items)
