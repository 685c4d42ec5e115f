"""act(gate) * up with the product made in place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from smedjan.backends.cpu_native.native.team import call, step
from smedjan.backends.cpu_native.table import DTYPES, PLANNED, RULES, compiled
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import row_blocks
from smedjan.backends.torch_reference.activation import gelu_bwd
from smedjan.graph.node import Node

LABEL = "cpu_native fused glu"


def _relu2(x):
    return torch.relu(x).square_()


ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": _relu2,
}
SLOPES: dict[str, Callable[..., torch.Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "swish": torch.ops.aten.silu_backward,
    "gelu": lambda dy, x: gelu_bwd(dy, x, approximate="none"),
    "gelu_pytorch_tanh": lambda dy, x: gelu_bwd(dy, x, approximate="tanh"),
    "gelu_new": lambda dy, x: gelu_bwd(dy, x, approximate="tanh"),
    "relu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
    "relu2": lambda dy, x: torch.relu(x).mul_(2.0).mul_(dy),
}
"""dy * act'(x)"""


@RULES.rule("glu", label=LABEL)
def glu(gate, up, *, act):
    return ACTIVATIONS[act](gate).mul_(up)


@RULES.rule("glu_bwd", label=LABEL)
def glu_bwd(gate, up, dy, *, needs, act):
    made = []
    if needs[0]:
        made.append(SLOPES[act](dy * up, gate))
    if needs[1]:
        made.append(ACTIVATIONS[act](gate).mul_(dy))
    return made[0] if len(made) == 1 else tuple(made)


# Of plans: one pass, forward and backward. Formulas in native/src/glu_rows.c.

NUMBERS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "relu": 2, "relu2": 3}
"""Activations that the kernels have."""


def _has(node: Node) -> bool:
    return node.attrs["act"] in NUMBERS and compiled(node)


def _stride(rows: torch.Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


@PLANNED.kernel("glu", label="native glu", supports=_has, inplace=((0, 0), (0, 1)), strided=True)
def planned_glu(run: Launches, ins: tuple, outs: tuple, *, act: str) -> None:
    steps = []
    for arrays in row_blocks((*ins, *outs)):
        assert arrays[0] is not None
        numbers = (*arrays[0].shape, *map(_stride, arrays), NUMBERS[act])
        steps.append(step(f"glu_fwd_{DTYPES[ins[0].dtype]}", arrays, numbers))
    call(run, "glu", *steps)


def _over(node: Node) -> tuple[tuple[int, int], ...]:
    """dgate over gate, dup over up, or either over dy: all three are read before."""
    outs = [index for index, need in enumerate(node.attrs["needs"]) if need]
    return tuple((at, given) for at, index in enumerate(outs) for given in (index, 2))


@PLANNED.kernel("glu_bwd", label="native glu", supports=_has, inplace=_over, strided=True)
def planned_glu_bwd(run: Launches, ins: tuple, outs: tuple, *, needs: tuple[bool, bool], act: str) -> None:
    found = iter(outs)
    dgate, dup = (next(found) if need else None for need in needs)
    if dgate is None and dup is None:
        return
    steps = []
    for arrays in row_blocks((*ins, dgate, dup)):
        assert arrays[0] is not None
        numbers = (*arrays[0].shape, *map(_stride, arrays), NUMBERS[act])
        steps.append(step(f"glu_bwd_{DTYPES[ins[0].dtype]}", arrays, numbers))
    call(run, "glu_bwd", *steps)
