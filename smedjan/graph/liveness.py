"""When a value was read for the last time, and how many bytes are alive at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.tensor import Tensor


def last_uses(nodes: Sequence[Node], graph: Graph) -> list[list[Tensor]]:
    """For each node, the tensors that may be freed once it has run. Outputs and inputs of the graph are kept."""
    kept = set(graph.outputs.values()) | set(graph.inputs.values())
    last: dict[Tensor, int] = {}
    for position, node in enumerate(nodes):
        for tensor in node.outputs:
            last[tensor] = position  # a value that nobody reads dies at once
        for read in node.inputs:
            if read is not None:
                last[read] = position
    freed: list[list[Tensor]] = [[] for _ in nodes]
    for tensor, position in last.items():
        if tensor not in kept and tensor.node.op is not INPUT:
            freed[position].append(tensor)
    return freed


def peak_bytes(nodes: Sequence[Node], graph: Graph, temporaries: Mapping[Node, int] | None = None) -> int:
    """The largest sum of bytes of values alive at once, inputs included, and what a node takes while it runs. Views
    count as copies: an upper bound."""
    alive = sum(tensor.nbytes for tensor in graph.inputs.values())
    peak = alive
    for node, freed in zip(nodes, last_uses(nodes, graph), strict=True):
        if node.op is not INPUT:
            updated = {index for index, _ in node.op.donated(node)}
            alive += sum(tensor.nbytes for index, tensor in enumerate(node.outputs) if index not in updated)
        peak = max(peak, alive + (temporaries or {}).get(node, 0))
        alive -= sum(tensor.nbytes for tensor in freed)
    return peak


def check_donations(nodes: Sequence[Node]) -> None:
    """A donated buffer is read by nobody after the op that takes it over."""
    last: dict[Tensor, Node] = {}
    for node in nodes:
        for tensor in node.inputs:
            if tensor is not None:
                last[tensor] = node
    for node in nodes:
        for _, index in node.op.donated(node):
            tensor = node.inputs[index]
            assert tensor is not None
            assert last[tensor] is node, f"{tensor} is donated to {node} but read later by {last[tensor]}"
