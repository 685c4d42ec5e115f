"""Programs in the memory that there is: what must be given up is, by the peak that each program plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from smedjan.errors import BackendError
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.recompute import fit, tiers

P = TypeVar("P", bound=Program)

Make = Callable[[Graph], P]
"""A backend's program of a graph. Its `peak_bytes` are what is planned by."""


def program(graph: Graph, memory: int | None, make: Make[P], *, offload: bool) -> P:
    """`offload`: the device's memory is not the host's, where kept values can wait."""
    if memory is None:
        return make(graph)
    tried: dict[int, P] = {}

    def peak(graph: Graph) -> int:
        tried[id(graph)] = made = make(graph)
        return made.peak_bytes

    fitted, decisions = fit(graph, budget=memory, peak=peak, offload=offload)
    # `tried` keeps its graphs: no other one has an id of theirs.
    made = tried[id(fitted)] if id(fitted) in tried else make(fitted)
    made.decisions = decisions
    if decisions and made.peak_bytes > memory:
        done = "recomputed and offloaded" if offload else "recomputed"
        raise BackendError(
            f"a step needs {made.peak_bytes / 1e9:.3g} GB, {done}, of {memory / 1e9:.3g}",
            field="memory",
            remedy="train fewer or shorter rows at a time, or by --method lora or qlora",
        )
    return made


def smallest(graph: Graph, memory: int | None, make: Make[P], *, offload: bool) -> P:
    """What gives up the fewest tiers and fits, or the program that needs least."""
    best = None
    for each in tiers(graph, offload=offload):
        made = make(each)
        if memory is None or made.peak_bytes <= memory:
            return made
        if best is None or made.peak_bytes < best.peak_bytes:
            best = made
    assert best is not None
    return best
