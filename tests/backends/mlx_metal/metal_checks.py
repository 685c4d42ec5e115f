"""What the tests of Metal kernels share: the bound of a kernel's numbers, arrays, and a kernel made wrong."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import torch
from mlx_pair import MLX, to_torch

from smedjan.backends.mlx_metal.kernels.common import Kernel
from tests.tolerances import UNIT_ROUNDOFF, error

INEXACT = 2.0**-20
"""Relative error of what a kernel chains: exp or tanh, and log, of 4 or 5 ulp at most (metal_shim.h), 2^-23 an ulp."""

DTYPES = FLOAT32, BFLOAT16, _ = (torch.float32, torch.bfloat16, torch.float16)
"""A kernel is compiled for each, and for each array of fewer than eight elements anew: wide shapes are not in all."""


def held(
    name: str,
    value: mx.array,
    twin: mx.array,
    reference: torch.Tensor,
    scale: float | None = None,
    inexact: float = INEXACT,
) -> None:
    """|value - reference| <= 2 |twin - reference| + (2 u + a) scale: tests/tolerances.py, a for Metal's functions."""
    found, plain = to_torch(MLX, value), to_torch(MLX, twin)
    assert found.dtype == plain.dtype, name
    scale = float(reference.abs().max()) if scale is None else scale
    most = 2 * error(plain, reference) + (2 * UNIT_ROUNDOFF[found.dtype] + inexact) * scale
    assert error(found, reference) <= most, f"{name}: {error(found, reference)} > {most}"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


BARRIER = "  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\n"


def without_barrier(kernel: Kernel, at: int) -> Kernel:
    """The kernel, its header before it, less one of its barriers."""
    parts = (kernel.header + "//body\n" + kernel.source).split(BARRIER)
    text = BARRIER.join(parts[: at + 1]) + BARRIER.join(["", *parts[at + 1 :]])[len(BARRIER) :]
    header, source = text.split("//body\n")
    return replace(kernel, source=source, header=header)
