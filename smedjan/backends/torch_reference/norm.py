"""The mean of an rms_norm; the norm itself runs as its decomposition, which is transformers' sequence of calls."""

from __future__ import annotations

from smedjan.backends.torch_reference.table import RULES


@RULES.rule("mean_last")
def mean_last(x):
    return x.mean(-1, keepdim=True)


@RULES.rule("mean_last_bwd")
def mean_last_bwd(dy, *, size):
    return dy.expand(*dy.shape[:-1], size) / size
