"""The rotation in place, one of a pair's two places after the other: no rotated copy."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native.table import RULES

LABEL = "cpu_native fused rope"


def _places(x, interleaved):
    """The first and the second place of each pair."""
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _rotate(x, cos, sin, sign, *, interleaved, upcast):
    dim = cos.shape[-1]
    part = x[..., :dim]
    if upcast:
        part, cos, sin = part.float(), cos.float(), sin.float()
    y = part * cos
    (first, second), (x1, x2), (sin1, sin2) = (_places(t, interleaved) for t in (y, part, sin))
    first.addcmul_(x2, sin1, value=-sign)
    second.addcmul_(x1, sin2, value=sign)
    y = y.to(x.dtype)
    return y if dim == x.shape[-1] else torch.cat((y, x[..., dim:]), dim=-1)


@RULES.rule("rope", label=LABEL)
def rope(x, cos, sin, **attrs):
    return _rotate(x, cos, sin, 1.0, **attrs)


@RULES.rule("rope_bwd", label=LABEL)
def rope_bwd(dy, cos, sin, **attrs):
    return _rotate(dy, cos, sin, -1.0, **attrs)
