"""One op and its VJP as a graph lowered by this backend: what a program runs, at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.torch_reference.elementwise import NAMES
from smedjan.graph.grad import grad
from smedjan.graph.node import Graph
from smedjan.graph.op import OPS
from smedjan.graph.program import Program
from smedjan.graph.rewrite import prune


def forward_and_gradients(
    op_name: str, ins: Sequence[Tensor | None], dys: Sequence[Tensor | None], wrt: Sequence[int], **attrs: Any
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The op's public results, the gradients of its inputs at `wrt`, and the names of the ops that ran. A cotangent
    that is None: nothing reads that result."""
    graph, values = Graph(), {}

    def given(name: str, array: Tensor | None) -> Any:
        if array is None:
            return None
        values[name] = array
        return graph.input(name, tuple(array.shape), NAMES[array.dtype])

    inputs = [given(f"in{number}", array) for number, array in enumerate(ins)]
    made = OPS[op_name](*inputs, **attrs)
    made = made if isinstance(made, tuple) else (made,)
    seeds = {y: given(f"dy{n}", dy) for n, (y, dy) in enumerate(zip(made, dys, strict=True)) if dy is not None}
    found = grad(made[0], [inputs[place] for place in wrt], seeds=seeds)
    for number, tensor in enumerate((*made, *found)):
        assert tensor is not None
        graph.output(f"out{number}", tensor)
    program = Program(prune(graph), RULES)
    results = list(program(values).values())
    return results[: len(made)], results[len(made) :], [call.node.op.name for call in program.calls]
