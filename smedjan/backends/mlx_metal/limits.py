"""What MLX is told of a run's memory: nothing is swapped, and what the run reads in every step stays wired.

Metal keeps a GPU's arrays where macOS can page them out, unless they are wired; a program that is larger than the
recommended working set makes macOS page while the GPU waits. So a run that is planned larger is refused, a smaller one
is wired as a whole, and freed buffers are kept no longer than there is room for them beside what is planned.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from smedjan.checkpoint.sizes import format_size
from smedjan.errors import BackendError

WIRED_FROM = 15
"""The macOS that has residency sets, which wiring is made of (`mx.set_wired_limit`)."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes. memory: beyond which MLX waits for what runs before it allocates; cache: of freed buffers that it keeps;
    wired: that macOS leaves in memory, None where it cannot be told."""

    memory: int
    cache: int
    wired: int | None


def limits_of(planned: int, *, working_set: int, macos: tuple[int, ...], remedy: str) -> Limits:
    """For a run of `planned` bytes on a GPU that holds `working_set` ones without slowing down.

    planned <= working_set, or BackendError. memory = working_set: MLX's own is 1.5 times that, into the swap. cache =
    working_set - planned: what is planned and what is kept fit together. wired = planned.
    """
    if planned > working_set:
        raise BackendError(
            f"{format_size(planned)} are needed, and this Mac's GPU holds {format_size(working_set)}: it would swap",
            field="memory",
            remedy=remedy,
        )
    wired = planned if macos[:1] >= (WIRED_FROM,) else None
    return Limits(memory=working_set, cache=working_set - planned, wired=wired)


def working_set() -> int:
    """Bytes that this Mac's GPU can hold without slowing down (`recommendedMaxWorkingSetSize`)."""
    return int(mx.device_info()["max_recommended_working_set_size"])


def macos() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit())


@contextmanager
def holding(planned: int, *, remedy: str) -> Iterator[None]:
    """MLX's limits for a run of `planned` bytes, and the former ones behind it."""
    with applied(limits_of(planned, working_set=working_set(), macos=macos(), remedy=remedy)):
        yield


@contextmanager
def applied(limits: Limits) -> Iterator[None]:
    memory, cache = mx.set_memory_limit(limits.memory), mx.set_cache_limit(limits.cache)
    wired = None if limits.wired is None else mx.set_wired_limit(limits.wired)
    try:
        yield
    finally:
        if wired is not None:
            mx.set_wired_limit(wired)
        mx.set_cache_limit(cache)
        mx.set_memory_limit(memory)
