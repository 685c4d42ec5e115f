"""The rule tables of `cpu_native`; ops without a rule of its own here are single aten calls of the exact backend.

RULES    give new arrays: for programs over caches, whose values grow. Compiled kernels (`native/`) take the ops of a
         decoding graph, one token of one sequence over caches: there an op is a pass over its weights and all else is
         overhead. They write themselves down on a tape, which `native/program.py` runs
PLANNED  fill arrays of a plan: for all others. Compiled kernels where there is a compiler, aten's `out=` forms
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cpu_native import native
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.table import PlannedRules
from smedjan.backends.planned.views import add_views
from smedjan.backends.torch_reference.table import RULES as ATEN
from smedjan.graph.lowering import Rule, RuleTable, Supports
from smedjan.graph.node import Graph, Node

Write = Callable[..., None]
"""write(tape: native.tape.Tape, ins: tuple, outs: tuple, **attrs): an optional input that was not given is None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRule(Rule):
    """`write` puts the op's steps on a tape; `run` does so for arrays that are made now, and plays it."""

    write: Write


def decoding(graph: Graph) -> bool:
    """Whether the graph makes one token of one sequence over caches, with no mask."""
    ids = graph.inputs.get("input_ids")
    return ids is not None and ids.shape == (1, 1) and "start" in graph.inputs and "attention_mask" not in graph.inputs


def floats(node: Node) -> bool:
    """Activations of a dtype that kernels have."""
    first = next(tensor for tensor in (*node.inputs, *node.outputs) if tensor is not None)
    return first.dtype in ("float32", "bfloat16")


class NativeRules(RuleTable):
    """Rules of aten calls, and of kernels for decoding graphs. Where nothing compiled those, the label says so."""

    def __init__(self, name: str, *, parent: RuleTable) -> None:
        super().__init__(name, parent=parent)
        self.compiled: dict[str, list[NativeRule]] = {}

    def native(self, op_name: str, *, kernel: str, supports: Supports = floats) -> Callable[[Write], Write]:
        """Decorator of a `write`."""

        def register(write: Write) -> Write:
            run = partial(_run_now, op_name, write)
            rule = NativeRule(run=run, label=f"native {kernel}", supports=supports, write=write)
            self.compiled.setdefault(op_name, []).append(rule)
            return write

        return register

    def find(self, node: Node) -> Rule | None:
        rules = [rule for rule in self.compiled.get(node.op.name, ()) if rule.supports is None or rule.supports(node)]
        if not rules or not decoding(node.graph):
            return super().find(node)
        if native.available():
            return rules[0]
        found = super().find(node)
        return None if found is None else replace(found, label=f"{found.label}, {native.reason()}")

    def ops(self) -> set[str]:
        return super().ops() | set(self.compiled)


def _run_now(op_name: str, write: Write, *ins: Any, **attrs: Any) -> Any:
    from smedjan.backends.cpu_native.native.tape import run_now

    return run_now(op_name, write, *ins, **attrs)


RULES = NativeRules("cpu_native", parent=ATEN)
PLANNED = PlannedRules("cpu_native", parent=RULES)
add_views(PLANNED)


def copy_to(run: Launches, source: Tensor, out: Tensor) -> None:
    run.library("aten copy", Tensor.copy_, out, source)


PLANNED.copy = copy_to

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Those that compiled kernels exist for, and the ends of their names."""


def compiled(node: Node) -> bool:
    """There is a compiler, and kernels for the dtype of the op's first operand, which every other float has or is
    float32."""
    floats = [t.dtype for t in (*node.inputs, *node.outputs) if t is not None and t.dtype not in ("int64", "bool")]
    return set(floats) <= {floats[0], "float32"} <= {"float32", "bfloat16"} and native.available()
