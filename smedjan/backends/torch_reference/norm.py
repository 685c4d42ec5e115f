"""Means and torch's own layer norm; other norms run as their decomposition: transformers' sequence of calls."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES


def _one_call(node):
    """torch's layer norm; the composed form decomposes into transformers' single calls."""
    return not node.attrs["composed"]


@RULES.rule("layer_norm", label="aten native_layer_norm", supports=_one_call)
def layer_norm(x, weight, bias, *, eps, composed):
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    return y, mean, rstd


@RULES.rule("layer_norm_bwd", label="aten native_layer_norm_backward", supports=_one_call)
def layer_norm_bwd(x, weight, bias, mean, rstd, dy, acc, *, needs, eps, composed):
    made = torch.ops.aten.native_layer_norm_backward(dy, x, list(weight.shape), mean, rstd, weight, bias, list(needs))
    kept = [gradient for gradient, need in zip(made, needs, strict=True) if need]
    if acc is not None:
        kept[0] = acc + kept[0]
    return kept[0] if len(kept) == 1 else tuple(kept)


@RULES.rule("mean_last")
def mean_last(x):
    return x.mean(-1, keepdim=True)


@RULES.rule("mean_last_bwd")
def mean_last_bwd(dy, *, size):
    return dy.expand(*dy.shape[:-1], size) / size
