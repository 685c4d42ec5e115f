"""Activations and their backward by name, as torch.autograd calls them."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES

RULES.rule("silu")(torch.nn.functional.silu)
RULES.rule("silu_bwd")(torch.ops.aten.silu_backward.default)
RULES.rule("tanh")(torch.tanh)
RULES.rule("tanh_bwd")(torch.ops.aten.tanh_backward.default)
RULES.rule("relu")(torch.relu)


@RULES.rule("relu_bwd")
def relu_bwd(dy, y):
    return torch.ops.aten.threshold_backward(dy, y, 0)


@RULES.rule("gelu")
def gelu(x, *, approximate):
    return torch.nn.functional.gelu(x, approximate=approximate)


@RULES.rule("gelu_bwd")
def gelu_bwd(dy, x, *, approximate):
    return torch.ops.aten.gelu_backward(dy, x, approximate=approximate)
