"""Both builds of the kernels, with vector code and without, each loaded in place of the one that the backend has."""

from __future__ import annotations

import ctypes

import pytest
import torch

from smedjan.backends.cpu_native import native
from smedjan.backends.cpu_native.native import tape
from smedjan.backends.cpu_native.native.build import compile_kernels, find_compiler


@pytest.fixture(params=["vector", "portable"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The library of one build; what it writes to is NaN before."""
    if find_compiler() is None:
        pytest.skip("needs a C compiler")
    made = compile_kernels(("SMEDJAN_PORTABLE",) if request.param == "portable" else ())
    assert made.library is not None, made
    library = ctypes.CDLL(str(made.library))
    forget = (tape._player.cache_clear, tape._address.cache_clear)
    for clear in forget:
        clear()
    monkeypatch.setattr(native, "_loaded", lambda: (library, made))
    monkeypatch.setattr(tape, "allocate", poisoned)
    yield library
    for clear in forget:
        clear()


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)
