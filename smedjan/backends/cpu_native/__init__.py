"""The fast backend of any CPU: aten matmul and attention, the other ops fused by hand into few passes over memory.

Held to bounds against `torch_reference`; what has no rule here runs as its decomposition in aten calls.
"""

from __future__ import annotations

from smedjan.backends.cpu_native import (  # noqa: F401  (each fills RULES)
    activation,
    attention,
    glu,
    lora,
    loss,
    norm,
    rope,
    steps,
)
from smedjan.backends.cpu_native.table import RULES
from smedjan.backends.torch_reference import TorchBackend


class CpuNative(TorchBackend):
    name = "cpu_native"
    exact = False
    rules = RULES


def backend() -> CpuNative:
    return CpuNative()
