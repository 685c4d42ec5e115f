"""Products of e4m3 numbers by torch's own casts, in float32."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES
from smedjan.ops.fp8 import LARGEST, SMALLEST_SCALE


@RULES.rule("fp8_rounded")
def fp8_rounded(x):
    wide = x.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    # The largest value may be 448 and a rounding: torch's cast would make it NaN.
    return (wide / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


@RULES.rule("fp8_linear")
def fp8_linear(x, weight, bias):
    """A rule and not the decomposition, whose gradient would be another: of the rounded operands."""
    wide = None if bias is None else bias.float()
    return torch.nn.functional.linear(fp8_rounded(x), fp8_rounded(weight), wide).to(x.dtype)
