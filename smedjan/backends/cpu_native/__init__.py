"""The fast backend of any CPU: aten's products and attention, compiled kernels for what lies between, planned buffers.

Held to bounds against `torch_reference`; what has no rule here runs as its decomposition in aten calls. A training step
is a fixed list of calls over memory that is planned once. Programs over caches, whose values grow, allocate theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smedjan.backends.cpu_native import (  # noqa: F401  (each fills RULES, PLANNED or both)
    activation,
    attention,
    elementwise,
    embedding,
    glu,
    linear,
    lora,
    loss,
    norm,
    optimizer,
    rope,
    steps,
    w8a8,
)
from smedjan.backends.cpu_native.native import rules as native_rules
from smedjan.backends.cpu_native.native.memory import Chunks
from smedjan.backends.cpu_native.table import PLANNED, RULES
from smedjan.backends.planned.pool import Pool
from smedjan.backends.planned.program import PlannedProgram
from smedjan.backends.torch_reference import TorchBackend
from smedjan.checkpoint.raw import RawTensor
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import decompose
from smedjan.passes.fuse import fuse
from smedjan.passes.fuse_backward import fuse_backward


class CpuNative(TorchBackend):
    name = "cpu_native"
    exact = False
    rules = PLANNED
    library_bytes = 70_000_000
    """Measured (2026-11-29, torch 2.13.0, one thread): MKL's and oneDNN's buffers and code, the tokenizer, the plan."""

    def __init__(self) -> None:
        self._chunks = Chunks()

    def from_raw(self, raw: RawTensor) -> torch.Tensor:
        made = self._chunks.array(raw)
        return super().from_raw(raw) if made is None else made

    def pool(self, memory: int | None = None, reserved: int = 0) -> Pool:
        return Pool(torch.device("cpu"), None if memory is None else memory - reserved)

    def w8a8_measure(self, *, field: str) -> Callable[..., float]:
        return w8a8.error

    def fuse(self, graph: Graph) -> Graph:
        return native_rules.fused(graph) if _has_cache(graph) else fuse(graph, _has)

    def program(self, graph: Graph, pool: Any = None) -> Program:
        if _has_cache(graph):
            graph = decompose(graph, RULES.has)
            return native_rules.program(graph) or Program(graph, RULES)
        return PlannedProgram(fuse_backward(graph, _has), PLANNED, pool or self.pool())


def _has_cache(graph: Graph) -> bool:
    return any(name.startswith("cache.") for name in graph.inputs)


def _has(op: str) -> bool:
    return op in PLANNED.ops()


def backend() -> CpuNative:
    return CpuNative()
