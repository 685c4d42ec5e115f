"""act(gate) * up with the product made in place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from smedjan.backends.cpu_native.table import RULES
from smedjan.backends.torch_reference.activation import gelu_bwd

LABEL = "cpu_native fused glu"


def _relu2(x):
    return torch.relu(x).square_()


ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": _relu2,
}
SLOPES: dict[str, Callable[..., torch.Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "swish": torch.ops.aten.silu_backward,
    "gelu": lambda dy, x: gelu_bwd(dy, x, approximate="none"),
    "gelu_pytorch_tanh": lambda dy, x: gelu_bwd(dy, x, approximate="tanh"),
    "gelu_new": lambda dy, x: gelu_bwd(dy, x, approximate="tanh"),
    "relu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
    "relu2": lambda dy, x: torch.relu(x).mul_(2.0).mul_(dy),
}
"""dy * act'(x)"""


@RULES.rule("glu", label=LABEL)
def glu(gate, up, *, act):
    return ACTIVATIONS[act](gate).mul_(up)


@RULES.rule("glu_bwd", label=LABEL)
def glu_bwd(gate, up, dy, *, needs, act):
    made = []
    if needs[0]:
        made.append(SLOPES[act](dy * up, gate))
    if needs[1]:
        made.append(ACTIVATIONS[act](gate).mul_(dy))
    return made[0] if len(made) == 1 else tuple(made)
