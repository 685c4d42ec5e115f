"""A graph as text: one line a node, with repeated layers folded."""

from __future__ import annotations

import re
from collections.abc import Iterator

from smedjan.graph.node import INPUT, Graph, Node


def lines(graph: Graph, *, fold: bool = True) -> Iterator[str]:
    """Inputs, nodes and outputs. With `fold`, layers after the first print as one line that says how many are equal."""
    for name, tensor in graph.inputs.items():
        yield f"input  {name}: {_kind(tensor.dtype, tensor.shape)}"
    folded: dict[str, int] = {}
    for node in graph.nodes:
        if node.op is INPUT:
            continue
        layer = re.match(r"layers\.(\d+)", node.scope)
        if fold and layer and layer.group(1) != "0":
            folded.setdefault(layer.group(1), 0)
            folded[layer.group(1)] += 1
            continue
        if folded:
            yield f"...    {len(folded)} more layers of the same form, {sum(folded.values())} nodes"
            folded = {}
        yield line(node)
    if folded:
        yield f"...    {len(folded)} more layers of the same form, {sum(folded.values())} nodes"
    for name, tensor in graph.outputs.items():
        yield f"output {name}: {tensor!r}"


def line(node: Node) -> str:
    outs = ", ".join(repr(tensor) for tensor in node.outputs)
    ins = ", ".join("-" if t is None else _reference(t) for t in node.inputs)
    attrs = "".join(f" {key}={value}" for key, value in sorted(node.attrs.items()))
    scope = f"   # {node.scope}" if node.scope else ""
    return f"{outs} = {node.op.name}({ins}){attrs}{scope}"


def _reference(tensor) -> str:
    node = tensor.node
    return str(node.attrs["name"]) if node.op is INPUT else f"%{node.id}.{tensor.index}"


def _kind(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}"
