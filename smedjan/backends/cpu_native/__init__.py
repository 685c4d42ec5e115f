"""The fast backend of any CPU: aten matmul and attention, the other ops fused by hand into few passes over memory.

Held to bounds against `torch_reference`; what has no rule here runs as its decomposition in aten calls.
"""

from __future__ import annotations

from typing import Any

import torch

from smedjan.backends.cpu_native import (  # noqa: F401  (each fills RULES)
    activation,
    attention,
    glu,
    lora,
    loss,
    norm,
    rope,
)
from smedjan.backends.cpu_native.native import rules as native_rules
from smedjan.backends.cpu_native.native.memory import Chunks
from smedjan.backends.cpu_native.table import RULES
from smedjan.backends.torch_reference import TorchBackend
from smedjan.checkpoint.raw import RawTensor
from smedjan.graph.node import Graph
from smedjan.graph.program import Program


class CpuNative(TorchBackend):
    name = "cpu_native"
    exact = False
    rules = RULES

    def __init__(self) -> None:
        self._chunks = Chunks()

    def from_raw(self, raw: RawTensor) -> torch.Tensor:
        made = self._chunks.array(raw)
        return super().from_raw(raw) if made is None else made

    def fuse(self, graph: Graph) -> Graph:
        return native_rules.fused(graph)

    def program(self, graph: Graph, pool: Any = None) -> Program:
        return native_rules.program(graph) or Program(graph, self.rules)


def backend() -> CpuNative:
    return CpuNative()
