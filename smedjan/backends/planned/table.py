"""Rule tables of planned backends: rules that write launches down, and views, which launch nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from smedjan.backends.planned.immediate import run_now, view_now
from smedjan.backends.planned.launch import Launches
from smedjan.graph.lowering import Bytes, Rule, RuleTable, Supports
from smedjan.graph.node import Node

Bind = Callable[..., None]
"""bind(run: Launches, ins: tuple, outs: tuple, **attrs): an optional input that was not given and a result that nobody
reads are None."""

Copy = Callable[[Launches, Tensor, Tensor], None]

Pairs = Callable[[Node], tuple[tuple[int, int], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRule(Rule):
    """
    bind     writes the launches down
    inplace  node -> (output, input) pairs that may be one buffer: every value is read before its place is written
    donates  node -> (output, input) pairs that are one buffer, which is updated; by default what the op declares
    order    output -> the dims of that output as memory has them, outermost first; (0, 2, 1, 3) puts the heads of
             [B, H, T, D] inside
    strided  the outputs may lie in a wider buffer: any strides, the last 1
    scalars  host scalars come as they are, for `Launches.host`; otherwise as arrays of the device
    """

    bind: Bind
    inplace: Pairs = field(default=lambda node: ())
    donates: Pairs = field(default=lambda node: ())
    order: dict[int, tuple[int, ...]] = field(default_factory=dict)
    strided: bool = False
    scalars: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRule(Rule):
    """`view(x, **attrs)` is the result, in x's memory; RuntimeError where strides do not allow it, and the values are
    copied. `inverse(y, node)`, where there is one, is the input's place for a result that must lie in y: for any y in C
    order."""

    view: Callable[..., Tensor | tuple[Tensor, ...]]
    inverse: Callable[[Tensor, Node], Tensor] | None = None


def adopted(rule: Rule) -> KernelRule:
    """A rule that gives new arrays, as one that fills those of the plan. What it updates in place lies there."""

    def bind(run: Launches, ins: tuple, outs: tuple, **attrs: Any) -> None:
        values = [x if x is None or isinstance(x, Tensor) else run.value(x) for x in ins]
        run.library(rule.label, _run_and_keep, partial(rule.run, **attrs), values, outs)

    def temporaries(node: Node) -> int:
        """What the rule takes, and its results, until they are copied."""
        donated = {index for index, _ in node.op.donated(node)}
        return rule.temporary_bytes(node) + sum(t.nbytes for t in node.outputs if t.index not in donated)

    return KernelRule(
        run=rule.run,
        label=rule.label,
        supports=rule.supports,
        temporaries=temporaries,
        bind=bind,
        donates=lambda node: node.op.donated(node),
        scalars=True,
    )


def _run_and_keep(function: Callable[..., Any], values: Sequence[Any], outs: Sequence[Tensor | None]) -> None:
    made = function(*(value() if callable(value) and not isinstance(value, Tensor) else value for value in values))
    for array, out in zip(made if isinstance(made, tuple) else (made,), outs, strict=True):
        if out is not None and array is not None and array is not out:
            out.copy_(array)


def _pairs(given: tuple[tuple[int, int], ...] | Pairs) -> Pairs:
    return given if callable(given) else lambda node: given


class PlannedRules(RuleTable):
    """Rules whose `run` allocates results and launches at once; a planned program uses `bind` and `view`.

    `copy` writes down a copy of one array to another of any strides. A parent's rules, which give new arrays, are
    adopted: they run as they are, and what they give is copied to its place.
    """

    copy: Copy

    def __init__(self, name: str, *, parent: RuleTable | None = None) -> None:
        super().__init__(name, parent=parent)
        self._adopted: dict[tuple[str, int], KernelRule] = {}

    def lower(self, node: Node) -> Rule:
        rule = super().lower(node)
        if isinstance(rule, KernelRule | ViewRule):
            return rule
        key = (node.op.name, id(rule))
        if key not in self._adopted:
            self._adopted[key] = adopted(rule)
        return self._adopted[key]

    def kernel(
        self,
        op_name: str,
        *,
        label: str,
        supports: Supports | None = None,
        inplace: tuple[tuple[int, int], ...] | Pairs = (),
        donates: tuple[tuple[int, int], ...] | Pairs = (),
        order: dict[int, tuple[int, ...]] | None = None,
        strided: bool = False,
        scalars: bool = False,
        temporaries: Bytes | None = None,
    ) -> Callable[[Bind], Bind]:
        """Decorator of a `bind`. `label` is "triton NAME", or names the library: "cublas mm"."""

        def register(bind: Bind) -> Bind:
            updated = _pairs(donates or (lambda node: node.op.donated(node)))
            rule = KernelRule(
                run=partial(run_now, op_name, bind, updated, scalars),
                label=label,
                supports=supports,
                temporaries=temporaries,
                bind=bind,
                inplace=_pairs(inplace),
                donates=updated,
                order=order or {},
                strided=strided,
                scalars=scalars,
            )
            self._rules.setdefault(op_name, []).insert(0, rule)
            return bind

        return register

    def view(
        self, op_name: str, *, inverse: Callable[[Tensor, Node], Tensor] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator of a function that gives a view of its input."""

        def register(view: Callable[..., Any]) -> Callable[..., Any]:
            run = partial(view_now, op_name, view, inverse)
            rule = ViewRule(run=run, label="view", view=view, inverse=inverse)
            self._rules.setdefault(op_name, []).insert(0, rule)
            return view

        return register
