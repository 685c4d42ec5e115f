"""Slices, splits and concatenations, as views where torch has them."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES

RULES.rule("zeros_like")(torch.zeros_like)


@RULES.rule("slice_last")
def slice_last(x, *, start, stop):
    return x[..., start:stop]


@RULES.rule("slice_last_bwd")
def slice_last_bwd(dy, *, size, start):
    return torch.ops.aten.slice_backward(dy, [*dy.shape[:-1], size], dy.ndim - 1, start, start + dy.shape[-1], 1)


@RULES.rule("split")
def split(x, *, sizes, dim):
    return torch.split(x, list(sizes), dim)


@RULES.rule("concat")
def concat(*parts, dim):
    return torch.cat(parts, dim)


@RULES.rule("narrow")
def narrow(x, *, dim, start, size):
    return x.narrow(dim, start, size)
