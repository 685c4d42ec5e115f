"""The rotation half by half, in place: no concatenation."""

from __future__ import annotations

from smedjan.backends.cpu_native.table import RULES


def _rotate(x, cos, sin, sign):
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return y


@RULES.rule("rope", label="cpu_native fused rope")
def rope(x, cos, sin):
    return _rotate(x, cos, sin, 1.0)


@RULES.rule("rope_bwd", label="cpu_native fused rope")
def rope_bwd(dy, cos, sin):
    return _rotate(dy, cos, sin, -1.0)
