"""The adapter's products added into the base's by BLAS itself: no scaled copy and no sum of its own."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native.table import RULES

LABEL = "cpu_native fused lora_linear"


def _float32(node) -> bool:
    """Other dtypes run decomposed: the sum of both products is rounded once, and BLAS would round each."""
    return all(t is None or t.dtype == "float32" for t in node.inputs)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


@RULES.rule("lora_linear", label=LABEL, supports=_float32)
def lora_linear(x, weight, bias, a, b, *, scaling):
    flat = _rows(x)
    low = flat @ a.t()
    y = torch.nn.functional.linear(flat, weight, bias).addmm_(low, b.t(), alpha=scaling)
    return y.view(*x.shape[:-1], -1), low.view(*x.shape[:-1], -1)


@RULES.rule("lora_linear_bwd", label=LABEL, supports=_float32)
def lora_linear_bwd(dy, x, weight, a, b, low, acc, *, needs, scaling):
    flat = _rows(dy)
    g = (flat @ b).mul_(scaling)
    made = []
    if needs[0]:
        dx = flat @ weight if acc is None else torch.addmm(_rows(acc), flat, weight)
        made.append(dx.addmm_(g, a).view(x.shape))
    if needs[1]:
        made.append(g.t() @ _rows(x))
    if needs[2]:
        made.append((flat.t() @ _rows(low)).mul_(scaling))
    return made[0] if len(made) == 1 else tuple(made)
