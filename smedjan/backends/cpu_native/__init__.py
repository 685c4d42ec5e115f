"""The fast backend of any CPU: aten's products, compiled kernels for attention and all between them, planned buffers.

Held to bounds against `torch_reference`; what has no rule here runs as its decomposition in aten calls. A training step
is a fixed list of calls over memory that is planned once. Programs over caches, whose values grow, allocate theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smedjan.backends.base import Forms
from smedjan.backends.cpu_native import (  # noqa: F401  (each fills RULES, PLANNED or both)
    activation,
    amx,
    attention,
    elementwise,
    embedding,
    glu,
    linear,
    lora,
    loss,
    norm,
    optimizer,
    quantized,
    rope,
    steps,
    w8a8,
)
from smedjan.backends.cpu_native.loss import CHUNK_ROWS
from smedjan.backends.cpu_native.native import rules as native_rules
from smedjan.backends.cpu_native.native.memory import Chunks
from smedjan.backends.cpu_native.table import PLANNED, RULES
from smedjan.backends.planned import fitted
from smedjan.backends.planned.pool import Pool
from smedjan.backends.planned.program import PlannedProgram
from smedjan.backends.torch_reference import LIBRARIES, TorchBackend
from smedjan.checkpoint.raw import RawTensor
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.recompute import NORMS, again
from smedjan.graph.rewrite import decompose
from smedjan.passes.fuse import fuse
from smedjan.passes.fuse_backward import fuse_backward

PRIMITIVE, PRIMITIVES = 820_000, 1024
"""Bytes of a primitive of oneDNN for a product of bfloat16: on the mean of 31 products 0.57 MB that it allocates and
0.25 MB of code, which it makes for each shape (2026-11-29, oneDNN 3.12, AMX); and how many it keeps, the latest."""

OWN_PRODUCTS = 47_000_000
"""LIBRARIES where products are ours, on AMX, but for an adapter's: 41 to 52 MB above the arrays of seven runs
(2026-11-30)."""

PRODUCTS = {torch.mm: 1, torch.addmm: 1, attention.backward: 6}
"""Calls that make primitives, and how many."""

LIGHT = ("glu", "rms_norm", "layer_norm", *NORMS)
"""Ops whose results are made again in the backward pass, however much memory there is: of a Llama they are a third of
what a step keeps, and each is one pass over memory, the next product's operand while that is in the cache."""


class CpuNative(TorchBackend):
    name = "cpu_native"
    exact = False
    rules = PLANNED
    recomputes = True

    def __init__(self) -> None:
        self._chunks = Chunks()

    def from_raw(self, raw: RawTensor) -> torch.Tensor:
        made = self._chunks.array(raw)
        return super().from_raw(raw) if made is None else made

    def library_bytes(self, program: Program, forms: Forms) -> int:
        """LIBRARIES, or OWN_PRODUCTS, and oneDNN's primitives for bfloat16 until it has as many as it keeps: one for
        each product of other shapes; of aten's attention backward three for whole blocks of queries and three for what
        is left."""
        rows = program.graph.inputs["loss_rows"].numel if "loss_rows" in program.graph.inputs else 0
        made: dict[Any, int] = {}
        calls = program.recorded() if isinstance(program, PlannedProgram) else ()
        ours = any(call.name == f"native {amx.CALL}" for call in calls)
        for call in calls:
            arrays = [x for x in call.args if isinstance(x, torch.Tensor)]
            if call.function in PRODUCTS and arrays[0].dtype == torch.bfloat16:
                shapes = tuple((x.shape, x.stride()) for x in arrays)
                of_rows = any(size in (rows, rows % CHUNK_ROWS) for x in arrays for size in x.shape)
                made[call.function, shapes] = PRODUCTS[call.function] * (forms.rows if of_rows else forms.lengths)
        return (OWN_PRODUCTS if ours and not made else LIBRARIES) + PRIMITIVE * min(sum(made.values()), PRIMITIVES)

    def pool(self, memory: int | None = None, reserved: int = 0) -> Pool:
        return Pool(torch.device("cpu"), None if memory is None else max(0, memory - reserved - LIBRARIES))

    def w8a8_measure(self, *, field: str) -> Callable[..., float]:
        return w8a8.error

    def fuse(self, graph: Graph) -> Graph:
        return native_rules.fused(graph) if _has_cache(graph) else fuse(graph, _has)

    def program(self, graph: Graph, pool: Any = None) -> Program:
        if _has_cache(graph):
            graph = decompose(graph, RULES.has)
            return native_rules.program(graph) or Program(graph, RULES)
        return fitted.program(_light(graph), PLANNED, pool or self.pool(), offload=False)

    def smallest(self, graph: Graph, pool: Any = None) -> Program:
        return fitted.smallest(_light(graph), PLANNED, pool or self.pool(), offload=False)


def _light(graph: Graph) -> Graph:
    """Fused once more, and what is sooner made again than kept. The host's memory is all there is: nothing is offloaded
    from it."""
    return again(fuse_backward(graph, _has), LIGHT)


def _has_cache(graph: Graph) -> bool:
    return any(name.startswith("cache.") for name in graph.inputs)


def _has(op: str) -> bool:
    return op in PLANNED.ops()


def backend() -> CpuNative:
    return CpuNative()
