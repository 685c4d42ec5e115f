"""The MLX backend: Apple GPUs through Metal, where programs are compiled, and MLX's CPU build elsewhere."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx

from smedjan.backends import fitted
from smedjan.backends.base import Backend
from smedjan.backends.collective import Collective
from smedjan.backends.mlx_metal import (  # noqa: F401  (each fills RULES)
    activation,
    attention,
    cache,
    elementwise,
    embedding,
    glu,
    limits,
    linear,
    lora,
    loss,
    norm,
    optimizer,
    quantized,
    random,
    rope,
)
from smedjan.backends.mlx_metal import (
    shape as shape_rules,  # noqa: F401
)
from smedjan.backends.mlx_metal.elementwise import DTYPES, NAMES
from smedjan.backends.mlx_metal.program import MlxProgram, Pool
from smedjan.backends.mlx_metal.table import RULES
from smedjan.checkpoint.raw import RawTensor
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.recompute import narrow
from smedjan.passes.fuse import fuse


class MlxBackend(Backend):
    name = "mlx_metal"
    exact = False
    rules = RULES

    def __init__(self, *, compiled: bool | None = None) -> None:
        """`compiled`: whether programs are (None: on Metal alone, since MLX's CPU build runs a C++ compiler, seconds
        long, for every kernel that it fuses). They are planned as they are run."""
        self.device = "metal" if mx.metal.is_available() else "cpu"
        # On Metal a step gives up what it must for what the GPU holds, whatever the flags say.
        self.recomputes = self.device == "cpu"
        self.compiled = self.device == "metal" if compiled is None else compiled

    def from_raw(self, raw: RawTensor) -> mx.array:
        """Bytes viewed as their dtype: numpy, which has no bfloat16, is not asked."""
        if raw.numel == 0:
            return mx.zeros(raw.shape, dtype=DTYPES[raw.dtype])
        return mx.array(raw.data.cast("B")).view(DTYPES[raw.dtype]).reshape(raw.shape)  # type: ignore[arg-type]

    def to_raw(self, array: mx.array) -> RawTensor:
        name, shape = NAMES[array.dtype], tuple(array.shape)
        if array.size == 0:
            return RawTensor(dtype=name, shape=shape, data=memoryview(b""))
        host = mx.contiguous(array.reshape(-1)).view(mx.uint8)
        mx.eval(host)
        return RawTensor(dtype=name, shape=shape, data=memoryview(host).cast("B"))  # type: ignore[arg-type]

    def zeros(self, shape: tuple[int, ...], dtype: str) -> mx.array:
        return mx.zeros(shape, dtype=DTYPES[dtype])

    def synchronize(self, arrays: Mapping[str, mx.array]) -> None:
        mx.eval(dict(arrays))

    def collective(self, *, rank: int, world: int) -> Collective:
        from smedjan.backends.mlx_metal.collective import MlxCollective

        return MlxCollective(rank=rank, world=world)

    def fuse(self, graph: Graph) -> Graph:
        return fuse(graph, lambda op: op in self.rules.ops())

    def pool(self, memory: int | None = None, reserved: int = 0) -> Pool:
        """On Metal, all that the GPU can hold without slowing down, if the run is not given less."""
        if memory is None and self.device == "metal":
            memory = limits.working_set()
        return Pool(None if memory is None else max(0, memory - reserved))

    def program(self, graph: Graph, pool: Any = None) -> Program:
        pool = pool or Pool()
        return fitted.program(narrow(graph), pool.memory, self._maker(pool), offload=False)

    def smallest(self, graph: Graph, pool: Any = None) -> Program:
        pool = pool or Pool()
        return fitted.smallest(narrow(graph), pool.memory, self._maker(pool), offload=False)

    def _maker(self, pool: Pool) -> fitted.Make[MlxProgram]:
        return lambda graph: MlxProgram(graph, self.rules, fuse=self.compiled, pool=pool)

    def holding(self, planned: int, *, remedy: str) -> AbstractContextManager[None]:
        return limits.holding(planned, remedy=remedy) if self.device == "metal" else nullcontext()

    def memory_available(self) -> int | None:
        """On Metal, what the GPU can hold without slowing down, less what MLX has there already."""
        if self.device != "metal":
            return super().memory_available()
        return max(0, limits.working_set() - mx.get_active_memory())

    def peak_memory(self) -> int:
        """Metal shares the machine's memory: MLX's own peak where there is a GPU, else the process's."""
        return mx.get_peak_memory() if self.device == "metal" else super().peak_memory()

    def reset_peak_memory(self) -> None:
        if self.device == "metal":
            mx.reset_peak_memory()
        else:
            super().reset_peak_memory()

    def versions(self) -> dict[str, str]:
        return {"mlx": importlib.metadata.version("mlx")}


def backend() -> MlxBackend:
    return MlxBackend()
