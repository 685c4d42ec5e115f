"""The kernels of decoding graphs, all modules loaded, and the fused ops that such a graph is written in for them."""

from __future__ import annotations

from smedjan.backends.cpu_native import native
from smedjan.backends.cpu_native.native import (  # noqa: F401  (each fills RULES)
    attention,
    embedding,
    glu,
    linear,
    norm,
    rope,
)
from smedjan.backends.cpu_native.native.program import NativeProgram
from smedjan.backends.cpu_native.table import RULES, NativeRule, decoding
from smedjan.graph.node import INPUT, Graph
from smedjan.graph.program import Program
from smedjan.ops.flash import cached_attention
from smedjan.ops.linear import linear_group
from smedjan.ops.norm import add_rms_norm
from smedjan.ops.rope import qk_norm_rope
from smedjan.passes.fuse import fuse

FUSED = frozenset(op.name for op in (linear_group, add_rms_norm, qk_norm_rope, cached_attention))


def fused(graph: Graph) -> Graph:
    """A decoding graph in fused ops, where there are kernels for them; any other as it is."""
    return fuse(graph, FUSED.__contains__) if decoding(graph) and native.available() else graph


def program(graph: Graph) -> Program | None:
    """A decoding graph's program, where kernels take part in it."""
    if not decoding(graph):
        return None
    taken = any(isinstance(RULES.find(node), NativeRule) for node in graph.nodes if node.op is not INPUT)
    return NativeProgram(graph, RULES) if taken else None
