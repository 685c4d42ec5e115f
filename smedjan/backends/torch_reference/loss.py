"""log_softmax and negative log-likelihood, as torch.nn.functional.cross_entropy(reduction="sum") calls them.

What else a head's losses are made of: a column of each row, and sums over trained rows.
"""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES

IGNORE = -100
SUM = 2  # at::Reduction::Sum


@RULES.rule("log_softmax")
def log_softmax(x):
    return torch.log_softmax(x, -1)


@RULES.rule("log_softmax_bwd")
def log_softmax_bwd(dy, y):
    return torch.ops.aten._log_softmax_backward_data(dy, y, 1, y.dtype)


@RULES.rule("nll_loss")
def nll_loss(log_probs, labels):
    return torch.nn.functional.nll_loss(log_probs, labels, ignore_index=IGNORE, reduction="sum")


@RULES.rule("nll_loss_bwd")
def nll_loss_bwd(dy, log_probs, labels):
    total = log_probs.new_zeros(())  # read only by the mean
    return torch.ops.aten.nll_loss_backward(dy, log_probs, labels, None, SUM, IGNORE, total)


@RULES.rule("smooth_loss")
def smooth_loss(log_probs, labels):
    return (-log_probs.sum(-1)).masked_fill_(labels == IGNORE, 0.0).sum()


@RULES.rule("smooth_loss_bwd")
def smooth_loss_bwd(dy, log_probs, labels):
    rows = dy.expand(labels.shape).masked_fill(labels == IGNORE, 0.0).neg()
    return rows.unsqueeze(-1).expand(log_probs.shape)


@RULES.rule("pick")
def pick(x, labels):
    trained = labels != IGNORE
    return x.gather(-1, (labels * trained).unsqueeze(-1)).squeeze(-1).masked_fill(~trained, 0.0)


@RULES.rule("pick_bwd")
def pick_bwd(dy, labels, *, size):
    trained = labels != IGNORE
    dx = dy.new_zeros(len(labels), size)
    return dx.scatter_(-1, (labels * trained).unsqueeze(-1), dy.masked_fill(~trained, 0.0).unsqueeze(-1))


@RULES.rule("sum_trained")
def sum_trained(x, labels):
    return x.masked_fill(_beside(labels == IGNORE, x), 0.0).sum()


@RULES.rule("sum_trained_bwd")
def sum_trained_bwd(dy, x, labels):
    return dy.expand(x.shape).masked_fill(_beside(labels == IGNORE, x), 0.0)


def _beside(rows, x):
    """rows [N] as [N, 1, ...], to broadcast over x [N, ...]"""
    return rows.view(-1, *(1,) * (x.dim() - 1))
