"""log_softmax and negative log-likelihood, as torch.nn.functional.cross_entropy(reduction="sum") calls them."""

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
