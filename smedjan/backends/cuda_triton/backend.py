"""The Triton backend: kernels on an NVIDIA GPU, or Triton's interpreter on the CPU when TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os

import torch

from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.torch_reference import TorchBackend
from smedjan.errors import BackendError


class CudaTriton(TorchBackend):
    name = "cuda_triton"
    exact = False
    rules = RULES

    def __init__(self) -> None:
        if torch.cuda.is_available():
            self.device = "cuda"
        elif os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError(
                "cuda_triton needs an NVIDIA GPU, and torch sees none",
                field="backend",
                remedy="choose cpu_native, or set TRITON_INTERPRET=1 to interpret the kernels on the CPU (for tests)",
            )

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
