"""One op at once, by the rule that the table has for it. For tests and benches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned.immediate import node_of, written
from smedjan.backends.planned.launch import Launch
from smedjan.backends.planned.table import KernelRule


def apply(op_name: str, *ins: Any, **attrs: Any) -> Any:
    """`apply("rms_norm", x, weight, eps=1e-5)` -> (y, rstd): the rule that the table has for this node, run at once."""
    node = node_of(op_name, ins, attrs)
    return RULES.lower(node).run(*ins, **node.attrs)


def prepare(op_name: str, *ins: Any, **attrs: Any) -> tuple[list[Launch], list[Tensor]]:
    """What `apply` would run, written down alone: for benches, which start it again and again."""
    node = node_of(op_name, ins, attrs)
    rule = RULES.lower(node)
    assert isinstance(rule, KernelRule), f"{op_name} is a view"
    return written(op_name, rule.bind, rule.donates, rule.scalars, *ins, **node.attrs)
