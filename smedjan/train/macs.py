"""Which Macs a run fits into: CPU and GPU share their memory, of which Metal keeps a part for the rest of the system.

The part that a GPU may hold without slowing down (`recommendedMaxWorkingSetSize`, MLX's
`max_recommended_working_set_size`) is two thirds of 32 GB and less, three quarters of 36 GB and more, by what
llama.cpp has logged of it:

    8 GB 5,726.63 MB · 16 GB 10,922.67 MiB (abetlen/llama-cpp-python#687) · 24 GB 17,179.89 MB
    32 GB 21,845.34 MiB (ollama/ollama#434) · 36 GB 28,991.03 MB · 64 GB 51,539.61 MB (ggml-org/llama.cpp#1870)

macOS 26 has more, 107.52 of 128 GiB (antirez/ds4#893), and `sudo sysctl iogpu.wired_limit_mb=N` sets it. On a Mac its
own is asked (`memory_available`); this is for who plans a run elsewhere, or for another Mac.
"""

from __future__ import annotations

from dataclasses import dataclass

GIGABYTES = (8, 16, 24, 36, 64)

UP_TO_32, FROM_36 = (2, 3), (3, 4)


@dataclass(frozen=True, kw_only=True)
class Mac:
    """One of so many gigabytes (of 2^30 bytes, as Apple counts memory), and whether its GPU holds the run."""

    gigabytes: int
    working_set_bytes: int
    fits: bool


def working_set(gigabytes: int) -> int:
    """Bytes that the GPU of a Mac may hold."""
    part, of = UP_TO_32 if gigabytes <= 32 else FROM_36
    return (gigabytes << 30) * part // of


def macs(planned_bytes: int) -> list[Mac]:
    return [
        Mac(gigabytes=size, working_set_bytes=working_set(size), fits=planned_bytes <= working_set(size))
        for size in GIGABYTES
    ]
