"""The exact backend: the aten calls of `transformers`, in its order and dtypes. The oracle of every other backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from smedjan.backends.base import Backend, Forms
from smedjan.backends.collective import Collective
from smedjan.backends.torch_reference import (  # noqa: F401  (each fills RULES)
    activation,
    attention,
    cache,
    elementwise,
    embedding,
    fp8,
    linear,
    lora,
    loss,
    norm,
    offload,
    optimizer,
    quantized,
    random,
    rope,
    steps,
    w8a8,
)
from smedjan.backends.torch_reference import (
    shape as shape_rules,  # noqa: F401
)
from smedjan.backends.torch_reference.elementwise import DTYPES, NAMES
from smedjan.backends.torch_reference.table import RULES
from smedjan.checkpoint.raw import RawTensor
from smedjan.graph.program import Program

LIBRARIES = 60_000_000
"""Bytes that a run on the CPU takes besides arrays: MKL's and oneDNN's buffers and code, the tokenizer, the plan, what
is written. Measured (2026-11-29, torch 2.13.0, one thread): 54 to 68 MB above the arrays of six runs."""


class TorchBackend(Backend):
    """Torch arrays: what the exact, the cpu_native and the Triton backend share."""

    def from_raw(self, raw: RawTensor) -> torch.Tensor:
        if raw.numel == 0:
            return torch.empty(raw.shape, dtype=DTYPES[raw.dtype], device=self.device)
        flat = torch.frombuffer(bytearray(raw.data), dtype=DTYPES[raw.dtype])
        return flat.reshape(raw.shape).to(self.device)

    def to_raw(self, array: torch.Tensor) -> RawTensor:
        host = array.detach().to("cpu").contiguous()
        flat: Any = host.reshape(-1).view(torch.uint8).numpy()
        data = memoryview(flat) if host.numel() else memoryview(b"")
        return RawTensor(dtype=NAMES[host.dtype], shape=tuple(host.shape), data=data.cast("B"))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.zeros(shape, dtype=DTYPES[dtype], device=self.device)

    def synchronize(self, arrays: Mapping[str, torch.Tensor]) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def collective(self, *, rank: int, world: int) -> Collective:
        from smedjan.backends.torch_reference.collective import TorchCollective

        return TorchCollective(self.device, rank=rank, world=world)

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}


class TorchReference(TorchBackend):
    name = "torch_reference"
    exact = True
    rules = RULES

    def library_bytes(self, program: Program, forms: Forms) -> int:
        return LIBRARIES

    def w8a8_measure(self, *, field: str) -> Callable[..., float]:
        return partial(w8a8.error, partial(w8a8.w8a8_linear, biased=False))


def backend() -> TorchReference:
    return TorchReference()
