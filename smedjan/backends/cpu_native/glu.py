"""silu(gate) * up with the product made in place."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native.table import RULES


@RULES.rule("glu", label="cpu_native fused glu")
def glu(gate, up, *, act):
    return torch.nn.functional.silu(gate).mul_(up)


@RULES.rule("glu_bwd", label="cpu_native fused glu")
def glu_bwd(gate, up, dy, *, needs, act):
    made = []
    if needs[0]:
        made.append(torch.ops.aten.silu_backward(dy * up, gate))
    if needs[1]:
        made.append(torch.nn.functional.silu(gate).mul_(dy))
    return made[0] if len(made) == 1 else tuple(made)
