"""cuda_triton's rules over the graph's ops, against float64; and the plan of a tiny Llama says what each op runs on."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.cuda_triton.rules import RULES, _bias
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import decompose
from smedjan.ops.attention import attention
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
FUSED = {op for op, _ in CASES.values()}


def test_every_attribute_of_a_fused_op_runs_on_a_kernel():
    """Attention alone is aten's; a layer norm too wide for a kernel's registers is too."""
    for name, (_, case) in CASES.items():
        for call in case.program(RULES, torch.bfloat16, exact=False).calls:
            op = call.node.op.name
            if op in FUSED and not op.startswith("attention"):
                assert call.label.startswith("triton"), f"{name}: {op} runs on {call.label}"


def test_a_capped_attention_is_decomposed():
    graph = Graph()
    q, k, v = (graph.input(name, (1, 2, 5, 8), "float32") for name in "qkv")
    mask = graph.input("m", (1, 1, 5, 5), "bool")
    graph.output("y", attention(q, k, v, mask, causal=False, scale=0.3, implementation="eager", cap=2.0))
    ran = {call.node.op.name for call in Program(decompose(graph, RULES.has), RULES).calls}
    assert {"tanh", "softmax", "matmul"} <= ran
    assert "attention" not in ran


@pytest.mark.parametrize("keys", [1, 7, 8, 13])
def test_the_bias_of_aten_attention_is_aligned(keys):
    """Its kernel takes rows that begin at multiples of 8 elements, and reads a mask of any width."""
    q, mask = torch.zeros(2, 3, 5, 8), torch.rand(2, 1, 5, keys) > 0.5
    bias = _bias(mask, q)
    assert bias.shape == (2, 3, 5, keys)
    assert bias.stride(3) == 1
    assert bias.stride(2) % 8 == bias.stride(0) % 8 == bias.stride(1) == 0
    assert torch.equal(bias == 0, mask.expand(2, 3, 5, keys))
    assert bool(bias[~mask.expand(2, 3, 5, keys)].isneginf().all())


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
