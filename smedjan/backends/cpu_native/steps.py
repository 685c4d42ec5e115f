"""Muon's matrix iteration in float32: bfloat16 is there for tensor cores, and without AMX a CPU is slower in it."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native.table import RULES
from smedjan.backends.torch_reference.steps import muon_step


@RULES.rule("muon_update", label="aten in float32")
def muon_update(*tensors, **attrs):
    return muon_step(*tensors, **attrs, dtype=torch.float32)
