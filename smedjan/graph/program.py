"""A graph lowered by one backend: a list of calls over slots, with values dropped after their last use."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from smedjan.graph.liveness import check_donations, last_uses, peak_bytes
from smedjan.graph.lowering import RuleTable
from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.op import Cost
from smedjan.graph.recompute import Decision


@dataclass(frozen=True, slots=True)
class Call:
    """One step of the loop: `slots[outs] = run(*slots[ins])`, then `frees` are dropped."""

    run: Callable[..., Any]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    frees: tuple[int, ...]
    node: Node
    label: str


NONE_SLOT = 0
"""The slot that always holds None: an optional input that was not given."""

Observer = Callable[[Node, tuple[Any, ...]], None]


class Program:
    """`program(inputs) -> outputs`, both dicts of arrays by the graph's names."""

    def __init__(self, graph: Graph, rules: RuleTable) -> None:
        self.graph = graph
        self.decisions: Sequence[Decision] = ()
        self.backend = rules.name
        nodes = [node for node in graph.live_nodes() if node.op is not INPUT]
        check_donations(nodes)
        slot = {tensor: index + 1 for index, tensor in enumerate(t for node in graph.nodes for t in node.outputs)}
        self._size = len(slot) + 1
        self._inputs = {name: slot[tensor] for name, tensor in graph.inputs.items()}
        self._outputs = {name: slot[tensor] for name, tensor in graph.outputs.items()}
        self.calls: list[Call] = []
        self.temporaries: dict[Node, int] = {}
        for node, freed in zip(nodes, last_uses(nodes, graph), strict=True):
            rule = rules.lower(node)
            self.temporaries[node] = rule.temporary_bytes(node)
            self.calls.append(
                Call(
                    run=partial(rule.run, **node.attrs) if node.attrs else rule.run,
                    ins=tuple(NONE_SLOT if t is None else slot[t] for t in node.inputs),
                    outs=tuple(slot[t] for t in node.outputs),
                    frees=tuple(slot[t] for t in freed),
                    node=node,
                    label=rule.label,
                )
            )
        self.plan_hash = self._hash()

    def __call__(self, inputs: Mapping[str, Any], *, observe: Observer | None = None) -> dict[str, Any]:
        """Runs the calls in order. `observe(node, outputs)` sees every intermediate value: parity bisects with it."""
        slots: list[Any] = [None] * self._size
        for name, index in self._inputs.items():
            slots[index] = inputs[name]
        for call in self.calls:
            made = call.run(*[slots[index] for index in call.ins])
            if len(call.outs) == 1:
                slots[call.outs[0]] = made
                made = (made,)
            else:
                for index, value in zip(call.outs, made, strict=True):
                    slots[index] = value
            if observe is not None:
                observe(call.node, made)
            del made
            for index in call.frees:
                slots[index] = None
        return {name: slots[index] for name, index in self._outputs.items()}

    def again(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Another run over what the last one was given."""
        return self(inputs)

    def starts(self, call: Call) -> bool:
        """Whether a call of `calls` computes something: a view does not."""
        return True

    @cached_property
    def cost(self) -> Cost:
        """FLOPs and bytes of one run, summed over the nodes that run."""
        return sum((call.node.op.cost(call.node) for call in self.calls), Cost())

    @property
    def peak_bytes(self) -> int:
        return peak_bytes([call.node for call in self.calls], self.graph, self.temporaries)

    @property
    def arena_bytes(self) -> int:
        """Of the memory that programs of one session share, one at a time; 0 where none is planned."""
        return 0

    def memory(self) -> list[dict[str, Any]]:
        """What is not kept from the forward to the backward pass for want of memory: `[{what, of, bytes}]`."""
        return [{"what": each.what, "of": each.of, "bytes": each.bytes} for each in self.decisions]

    def launches(self) -> Counter[str]:
        """How often a run starts each kernel or library call, by name; empty where a backend does not plan them."""
        return Counter()

    def lowerings(self) -> list[dict[str, Any]]:
        """What ran on what: `[{op, count, lowering}]`, the commonest first."""
        counted = Counter((call.node.op.name, call.label) for call in self.calls)
        return [{"op": op, "count": count, "lowering": label} for (op, label), count in counted.most_common()]

    def _hash(self) -> str:
        """Sixteen hex digits over backend, ops, attributes, wiring and rules: equal plans are equal programs."""
        digest = hashlib.sha256(self.backend.encode())
        for name, tensor in self.graph.inputs.items():
            digest.update(f"{name}:{tensor.dtype}{tensor.shape}".encode())
        for call in self.calls:
            attrs = json.dumps(call.node.attrs, sort_keys=True, default=repr)
            digest.update(f"{call.label}|{call.node.op.name}|{attrs}|{call.ins}|{call.outs}".encode())
        return digest.hexdigest()[:16]
