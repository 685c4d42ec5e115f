"""Planned programs in the memory that there is: graph/recompute.py gives up what it must, by the plan's own bytes."""

from __future__ import annotations

from smedjan.backends.planned.pool import Pool
from smedjan.backends.planned.program import PlannedProgram
from smedjan.backends.planned.table import PlannedRules
from smedjan.errors import BackendError
from smedjan.graph.node import Graph
from smedjan.graph.recompute import fit, tiers


def program(graph: Graph, rules: PlannedRules, pool: Pool, *, offload: bool) -> PlannedProgram:
    """`offload`: the device's memory is not the host's, where kept values can wait."""
    if pool.memory is None:
        return PlannedProgram(graph, rules, pool)
    fitted, decisions = fit(
        graph, budget=pool.memory, peak=lambda graph: PlannedProgram(graph, rules, pool).peak_bytes, offload=offload
    )
    made = PlannedProgram(fitted, rules, pool, decisions)
    if decisions and made.peak_bytes > pool.memory:
        done = "recomputed and offloaded" if offload else "recomputed"
        raise BackendError(
            f"a step needs {made.peak_bytes / 1e9:.3g} GB, {done}, of {pool.memory / 1e9:.3g}",
            field="memory",
            remedy="train fewer or shorter rows at a time, or by --method lora or qlora",
        )
    return made


def smallest(graph: Graph, rules: PlannedRules, pool: Pool, *, offload: bool) -> PlannedProgram:
    """What gives up the fewest tiers and fits, or the program that needs least."""
    best = None
    for each in tiers(graph, offload=offload):
        made = PlannedProgram(each, rules, pool)
        if pool.memory is None or made.peak_bytes <= pool.memory:
            return made
        if best is None or made.peak_bytes < best.peak_bytes:
            best = made
    assert best is not None
    return best
