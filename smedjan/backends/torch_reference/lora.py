"""The norms of DoRA by the aten calls of `peft` (tuners/lora/dora.py)."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES


@RULES.rule("dora_norm")
def dora_norm(weight, a, b, *, scaling):
    """peft sends an identity through A, which gives A^T, and that through B: B A as the transpose of [I, O]."""
    product = torch.nn.functional.linear(a.t().contiguous(), b).t()
    return torch.linalg.norm(weight.float() + scaling * product, dim=1)
