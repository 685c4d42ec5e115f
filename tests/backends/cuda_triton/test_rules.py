"""cuda_triton's rules over the graph's ops, against float64; and the plan of a tiny Llama says what each op runs on."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.cuda_triton.rules import RULES
from smedjan.passes.lora import Lora
from tests.backends.cpu_native.fused_cases import CASES
from tests.backends.cpu_native.tiny_llama import check_step, programs
from tests.backends.cuda_triton.conftest import DEVICE

LORA = Lora(rank=3, alpha=6.0, dropout=0.3, targets=("q_proj", "v_proj", "down_proj"))
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the cases' arrays are on the CPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fused_op(name, dtype):
    op, case = CASES[name]
    case.check(RULES, op, dtype)


KERNELS = {
    "rms_norm": "triton rms_norm",
    "rms_norm_bwd": "triton rms_norm_bwd",
    "rope": "triton rope",
    "rope_bwd": "triton rope",
    "glu": "triton glu",
    "glu_bwd": "triton glu_bwd",
    "linear_cross_entropy": "triton cross_entropy + aten mm",
}
UPDATE = {"global_norm": "triton global_norm", "adamw_update": "triton adamw_update"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_plan_names_what_is_no_kernel(lora, dtype):
    """Each op of each program of a step is one of the kernels or an aten call that says so."""
    *micros, update = programs("cuda_triton", lora=lora, dtype=dtype)
    for program, kernels in (*((micro, KERNELS) for micro in micros), (update, UPDATE)):
        rows = program.lowerings()
        assert sum(row["count"] for row in rows) == len(program.calls)
        assert {row["op"]: row["lowering"] for row in rows if row["lowering"].startswith("triton")} == kernels
        assert all(row["lowering"].startswith(("triton", "aten")) for row in rows), rows
        # The label is of what runs here, on the CPU, not of what would run on a GPU.
        attention = {row["lowering"] for row in rows if row["op"].startswith("attention")}
        assert attention <= {"aten flash attention (CPU)"}


@pytest.mark.parametrize(("kind", "dtype", "lora"), [("none", "float32", None), ("packed", "bfloat16", LORA)])
def test_a_step_of_a_tiny_llama(kind, dtype, lora):
    check_step("cuda_triton", kind, dtype, lora)
