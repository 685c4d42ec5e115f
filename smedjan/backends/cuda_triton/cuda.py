"""The Triton backend: kernels on an NVIDIA GPU, or Triton's interpreter on the CPU when TRITON_INTERPRET=1 is set.

On a machine with neither it plans (`smedjan graph --plan`), and the first array that it is to hold is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from smedjan.backends.cuda_triton.fp8 import CAPABILITY, fp8_error
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned import fitted
from smedjan.backends.planned.pool import Pool
from smedjan.backends.planned.program import PlannedProgram
from smedjan.backends.torch_reference import TorchBackend
from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.checkpoint.raw import RawTensor
from smedjan.errors import BackendError, ConfigError
from smedjan.graph.node import Graph
from smedjan.passes.fuse import fuse
from smedjan.passes.fuse_backward import fuse_backward

RESERVED = 1 << 30
"""Bytes of a device that are not ours to plan: CUDA's context, cuBLAS's workspaces, code."""


class CudaTriton(TorchBackend):
    name = "cuda_triton"
    exact = False
    rules = RULES

    def __init__(self) -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            self.device = "cuda" if torch.cuda.is_available() else "meta"
        # Split products of bfloat16 are summed in float32: cuBLAS would otherwise round between the parts.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def _ready(self) -> None:
        if self.device == "meta":
            raise BackendError(
                "cuda_triton needs an NVIDIA GPU, and torch sees none",
                field="backend",
                remedy="choose cpu_native, or give --interpret to interpret the kernels on the CPU (slow: for tests)",
            )

    def from_raw(self, raw: RawTensor) -> torch.Tensor:
        self._ready()
        return super().from_raw(raw)

    def to_raw(self, array: torch.Tensor) -> RawTensor:
        """A copy always: programs write to their outputs again."""
        return super().to_raw(array.clone() if self.device == "cpu" else array)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        self._ready()
        return super().zeros(shape, dtype)

    def batch(self, raw: RawTensor) -> torch.Tensor:
        """On the host, in pinned memory: a program copies it to where it reads it, without waiting."""
        self._ready()
        if self.device != "cuda" or raw.numel == 0:
            return super().from_raw(raw)
        flat = torch.frombuffer(bytearray(raw.data), dtype=DTYPES[raw.dtype])
        return flat.reshape(raw.shape).pin_memory()

    def pool(self, memory: int | None = None, reserved: int = 0) -> Pool:
        if memory is None and self.device == "cuda":
            memory = torch.cuda.get_device_properties(0).total_memory - RESERVED
        return Pool(torch.device(self.device), None if memory is None else memory - reserved)

    @property
    def timed(self) -> bool:
        return self.device == "cuda"

    def peak_flops(self, dtype: str) -> float | None:
        """Unknown in the interpreter, whose speed is nobody's."""
        return super().peak_flops(dtype) if self.device == "cuda" else None

    def fuse(self, graph: Graph) -> Graph:
        return fuse(graph, self._has)

    def program(self, graph: Graph, pool: Any = None) -> PlannedProgram:
        """Fused once more, and fitted into the memory that there is."""
        return fitted.program(fuse_backward(graph, self._has), RULES, pool or self.pool(), offload=True)

    def smallest(self, graph: Graph, pool: Any = None) -> PlannedProgram:
        return fitted.smallest(fuse_backward(graph, self._has), RULES, pool or self.pool(), offload=True)

    def _has(self, op: str) -> bool:
        return op in RULES.ops()

    def fp8_measure(self, *, field: str) -> Callable[[torch.Tensor, torch.Tensor], float]:
        if self.device == "cuda" and (found := torch.cuda.get_device_capability()) < CAPABILITY:
            has, needs = (".".join(map(str, each)) for each in (found, CAPABILITY))
            raise ConfigError(
                f"8-bit floats need compute capability {needs}, and this GPU has {has}",
                field=field,
                remedy="leave it out",
            )
        return fp8_error

    def memory_available(self) -> int | None:
        """What is free on the GPU and what torch holds of it unused, but for what is reserved; unknown without one."""
        if self.device == "cpu":
            return super().memory_available()
        if self.device == "meta":
            return None
        free, _ = torch.cuda.mem_get_info()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return max(0, free + unused - RESERVED)

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else super().peak_memory()

    def reset_peak_memory(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            super().reset_peak_memory()

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {**super().versions(), "triton": version("triton")}
