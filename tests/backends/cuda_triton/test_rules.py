"""cuda_triton's rules over the graph's ops, against float64; and a step of a tiny Llama on nothing else."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.cuda_triton.table import LIBRARIES
from smedjan.errors import BackendError
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.ops.attention import softmax
from smedjan.passes.lora import Lora
from tests.backends.cpu_native.fused_cases import CASES
from tests.backends.cpu_native.tiny_llama import check_step, programs
from tests.backends.cuda_triton.conftest import DEVICE

LORA = Lora(rank=3, alpha=6.0, dropout=0.3, targets=("q_proj", "v_proj", "down_proj"))
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the cases' arrays are on the CPU")
OURS = {name: case for name, case in CASES.items() if not case[0].startswith("attention")}
"""Attention is fused with its mask first: tests of its own."""
FUSED = {op for op, _ in OURS.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_fused_op(name, dtype):
    op, case = OURS[name]
    case.check(RULES, op, dtype)


def test_every_attribute_of_a_fused_op_runs_on_a_kernel():
    for name, (_, case) in OURS.items():
        for call in case.program(RULES, torch.bfloat16, exact=False).calls:
            op = call.node.op.name
            if op in FUSED:
                assert call.label.startswith("triton"), f"{name}: {op} runs on {call.label}"


def test_an_op_without_a_rule_is_an_error_that_names_it():
    graph = Graph()
    graph.output("y", softmax(graph.input("x", (2, 3), "float32")))
    with pytest.raises(BackendError, match=r"cuda_triton has no lowering for the op 'softmax'"):
        Program(graph, RULES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_plan_has_kernels_views_and_named_libraries_alone(lora, dtype):
    for program in programs("cuda_triton", lora=lora, dtype=dtype):
        rows = program.lowerings()
        assert sum(row["count"] for row in rows) == len(program.calls)
        assert all(row["lowering"].startswith(("triton ", "view", *LIBRARIES)) for row in rows), rows


@pytest.mark.parametrize(
    ("kind", "dtype", "lora"),
    [("none", "float32", None), pytest.param("packed", "bfloat16", LORA, marks=pytest.mark.slow)],
)
def test_a_step_of_a_tiny_llama(kind, dtype, lora):
    check_step("cuda_triton", kind, dtype, lora)
