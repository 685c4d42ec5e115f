"""The rule table: which op a backend runs, and how.

A rule is a plain function of arrays and attributes. `supports=` says for which nodes it holds; a node that no rule
supports is decomposed, and a node that cannot be decomposed is an error that names op, backend and model. Nothing else
is ever run in a rule's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smedjan.errors import BackendError
from smedjan.graph.node import Node

Supports = Callable[[Any], bool]

Bytes = Callable[[Any], int]


@dataclass(frozen=True, slots=True)
class Rule:
    """`run(*arrays, **attrs) -> array or tuple of arrays`; `label` is what the printed plan says of it.

    temporaries  node -> bytes that a run allocates, and frees again, besides its results
    """

    run: Callable[..., Any]
    label: str
    supports: Supports | None = None
    temporaries: Bytes | None = None

    def temporary_bytes(self, node: Node) -> int:
        return 0 if self.temporaries is None else self.temporaries(node)


class RuleTable:
    """Rules by op name, newest first; what is not found here is looked up in `parent`."""

    def __init__(self, name: str, *, parent: RuleTable | None = None) -> None:
        self.name = name
        self.parent = parent
        self._rules: dict[str, list[Rule]] = {}

    def rule(
        self,
        op_name: str,
        *,
        label: str | None = None,
        supports: Supports | None = None,
        temporaries: Bytes | None = None,
    ) -> Callable[..., Any]:
        """Decorator: `@table.rule("rms_norm", label="triton rms_norm")`."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._rules.setdefault(op_name, []).insert(0, Rule(function, label or self.name, supports, temporaries))
            return function

        return register

    def find(self, node: Node) -> Rule | None:
        for rule in self._rules.get(node.op.name, ()):
            if rule.supports is None or rule.supports(node):
                return rule
        return self.parent.find(node) if self.parent is not None else None

    def has(self, node: Node) -> bool:
        return self.find(node) is not None

    def lower(self, node: Node) -> Rule:
        rule = self.find(node)
        if rule is None:
            raise BackendError(
                f"the backend {self.name} has no lowering for the op {node.op.name!r} (in {node.scope or 'the model'})",
                field=node.op.name,
                remedy="choose another --backend; `smedjan graph DIR --plan` lists every op's lowering",
            )
        return rule

    def ops(self) -> set[str]:
        """Names of the ops that have a rule here or in a parent."""
        return set(self._rules) | (self.parent.ops() if self.parent is not None else set())
