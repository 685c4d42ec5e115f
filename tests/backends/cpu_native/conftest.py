"""Builds of the kernels of plans: this CPU's, those of lesser ones, and plain C."""

from __future__ import annotations

import ctypes
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from smedjan.backends.cpu_native import attention, native
from smedjan.backends.cpu_native.native import team
from smedjan.backends.cpu_native.native.build import compile_kernels, find_compiler
from smedjan.backends.planned import immediate

BUILDS = {"this CPU's": "", "no AVX-512": " -mno-avx512f", "no VNNI": " -mno-avx512f -mno-avxvnni", "portable": None}
"""What is added to the compiler's name; None: no intrinsics at all."""


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with loaded(request.param, monkeypatch):
        yield request.param


@contextmanager
def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels of one build in the place of the backend's own; scratch and results are NaN, or a code, before. As
    many threads as there were are there again behind."""
    flags, compiler = BUILDS[name], find_compiler()
    if compiler is None:
        pytest.skip("needs a C compiler")
    if flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("of x86")
    if flags:
        monkeypatch.setenv("CC", shlex.join(compiler) + flags)
    made = compile_kernels(("SMEDJAN_PORTABLE",) if flags is None else ())
    if flags and made.library is None and "unrecognized" in made.detail:
        pytest.skip(f"a compiler without {flags}")
    assert made.library is not None, made
    library = ctypes.CDLL(str(made.library))
    monkeypatch.setattr(native, "_loaded", lambda: (library, made))
    monkeypatch.setattr(immediate, "allocate", poisoned)
    before, caches = torch.get_num_threads(), (team._address, team._team, attention._floats)
    for each in caches:
        each.cache_clear()
    yield
    torch.set_num_threads(before)
    for each in caches:
        each.cache_clear()


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else 85, dtype=dtype, device=device)
