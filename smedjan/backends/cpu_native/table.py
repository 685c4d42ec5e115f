"""The rule tables of `cpu_native`; ops without a fused form here are single aten calls of the exact backend.

RULES   give new arrays: for programs over caches, whose values grow from call to call
PLANNED fill arrays of a plan: for all others. Compiled kernels where there is a compiler, aten's `out=` forms
"""

from __future__ import annotations

import torch
from torch import Tensor

from smedjan.backends.cpu_native import native
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.table import PlannedRules
from smedjan.backends.planned.views import add_views
from smedjan.backends.torch_reference.table import RULES as ATEN
from smedjan.graph.lowering import RuleTable
from smedjan.graph.node import Node

RULES = RuleTable("cpu_native", parent=ATEN)
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
