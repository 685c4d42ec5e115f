"""Steps of compiled kernels over arrays of a plan, run by the threads that torch's own products run on."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cpu_native import native
from smedjan.backends.planned.launch import Launches

ARRAYS, NUMBERS, REALS = 16, 12, 4
"""As in src/tape.h."""


class Step(ctypes.Structure):
    """src/tape.h: struct step. `held` keeps its arrays."""

    held: tuple[Tensor | None, ...]

    _fields_ = (
        ("run", ctypes.c_void_p),
        ("array", ctypes.c_void_p * ARRAYS),
        ("number", ctypes.c_int64 * NUMBERS),
        ("real", ctypes.c_float * REALS),
    )


@cache
def _address(kernel: str) -> int:
    found = ctypes.cast(getattr(native.library(), kernel), ctypes.c_void_p).value
    assert found is not None
    return found


@cache
def _team() -> Any:
    """smedjan_team, told of the OpenMP runtime that torch has loaded, where that is GNU's."""
    library = native.library()
    team = library.smedjan_team
    team.argtypes, team.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), None
    loaded = _loaded_openmp()
    if loaded is not None:
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        library.smedjan_team_use.argtypes = (ctypes.c_void_p,) * 3
        library.smedjan_team_use(*(ctypes.cast(getattr(loaded, name), ctypes.c_void_p) for name in names))
    return team


def _loaded_openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP runtime as torch brings it along; None where torch has another one, and kernels run on threads of
    their own."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        return ctypes.CDLL(str(path))
    return None


def threads() -> int:
    return torch.get_num_threads()


def step(
    kernel: str, arrays: Sequence[Tensor | None], numbers: Sequence[int] = (), reals: Sequence[float] = ()
) -> Step:
    """A call of src's `smedjan_KERNEL` with the addresses that the arrays have now."""
    made = Step(run=_address(f"smedjan_{kernel}"))
    made.array[: len(arrays)] = [None if array is None else array.data_ptr() or None for array in arrays]
    made.number[: len(numbers)] = numbers
    made.real[: len(reals)] = reals
    made.held = tuple(arrays)
    return made


def call(run: Launches, name: str, *steps: Step) -> None:
    """Writes down one call for steps of which none reads what another one writes."""
    tape = (Step * len(steps))(*steps)
    held = tuple(each.held for each in steps)
    run.library(f"native {name}", _play, tape, len(steps), threads(), held)


def _play(tape: Any, count: int, threads: int, held: Any) -> None:
    """`held` is what the addresses on the tape are of: scratch lives as long as the call."""
    _team()(tape, count, threads)
