"""The speed on NVIDIA: Triton kernels (`kernels/`) behind the rules of `rules.py`. Importing this imports no triton."""

from __future__ import annotations

from smedjan.backends.base import Backend


def backend() -> Backend:
    from smedjan.backends.cuda_triton.cuda import CudaTriton

    return CudaTriton()
