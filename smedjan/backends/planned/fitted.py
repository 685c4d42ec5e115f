"""Planned programs in the memory that their pool gives them."""

from __future__ import annotations

from smedjan.backends import fitted
from smedjan.backends.planned.pool import Pool
from smedjan.backends.planned.program import PlannedProgram
from smedjan.backends.planned.table import PlannedRules
from smedjan.graph.node import Graph


def program(graph: Graph, rules: PlannedRules, pool: Pool, *, offload: bool) -> PlannedProgram:
    """`offload`: the device's memory is not the host's, where kept values can wait."""
    return fitted.program(graph, pool.memory, lambda graph: PlannedProgram(graph, rules, pool), offload=offload)


def smallest(graph: Graph, rules: PlannedRules, pool: Pool, *, offload: bool) -> PlannedProgram:
    """What gives up the fewest tiers and fits, or the program that needs least."""
    return fitted.smallest(graph, pool.memory, lambda graph: PlannedProgram(graph, rules, pool), offload=offload)
