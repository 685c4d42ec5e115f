"""Metal kernels as the rules of this backend: every case of `mlx_cases.py` whose op a kernel lowers, gradients too, and
a whole model. `metal_emulator.py` says how they run here."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_emulator import Recorder
from mlx_cases import CASES
from mlx_pair import MLX, Case, check

from smedjan.backends.mlx_metal import MlxProgram
from smedjan.backends.mlx_metal.kernels import common
from smedjan.graph.lowering import Rule
from tests.backends import test_families
from tests.families import CASES as FAMILIES


def kernel_ops() -> set[str]:
    """Ops with a rule that is for Metal alone: each has another, its twin."""
    return {name for name, rules in MLX.rules._rules.items() if any(_is_kernel(rule) for rule in rules)}


def _is_kernel(rule: Rule) -> bool:
    return "metal " in rule.label


def test_each_kernel_has_a_twin_and_the_plan_says_which_one_runs(metal, monkeypatch):
    for name in kernel_ops():
        rules = MLX.rules._rules[name]
        assert any(not _is_kernel(rule) for rule in rules), f"{name} has no twin"
    case = CASES["linear_cross_entropy"]
    assert labels(case)["linear_cross_entropy"] == "mlx, chunked rows, metal cross_entropy"
    monkeypatch.undo()
    assert labels(case)["linear_cross_entropy"] == "mlx, chunked rows"


def labels(case: Case) -> dict[str, str]:
    return {call.node.op.name: call.label for call in case.program(MLX, "float32").calls}


def emulated() -> list[str]:
    """Cases whose program has a kernel."""
    ops = kernel_ops()
    return [
        name for name, case in CASES.items() if any(c.node.op.name in ops for c in case.program(MLX, "float32").calls)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", emulated())
def test_rule(name, dtype, metal):
    check(CASES[name], dtype)
    assert metal.launched, "no kernel ran"


def test_every_kernel_op_is_in_a_case():
    run = {call.node.op.name for name in emulated() for call in CASES[name].program(MLX, "float32").calls}
    assert kernel_ops() <= run


def test_a_whole_model_is_as_near_the_truth_as_transformers(metal):
    """Logits, all gradients and cached decode, where every kernel of the model runs from its source."""
    case = next(iter(FAMILIES["qwen3"]))
    test_families.test_as_near_the_truth_as_transformers("mlx_metal", "bfloat16", "qwen3", case)
    kernels = {kernel.name.removeprefix("smedjan_") for kernel, _ in metal.launched}
    assert {"add_rms_norm", "rms_norm_bwd_1110", "qk_norm_rope", "norm_rope_bwd_11", "cross_entropy"} <= kernels


def test_a_step_traces_under_compile_with_the_same_kernels_again(monkeypatch):
    """A kernel is made once: what `mx.compile` traces a second time finds the functions of the first."""
    recorder = Recorder()
    monkeypatch.setattr(common, "DEVICE", recorder)
    case = CASES["add_rms_norm"]
    plain = case.program(MLX, "bfloat16")
    inputs = case.bind(MLX, plain, "bfloat16")
    monkeypatch.setattr(mx, "eval", lambda *_: None)
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    programs = [MlxProgram(plain.graph, MLX.rules, fuse=True) for _ in range(2)]
    del recorder.launched[:]  # planning has traced them
    for made in programs:
        assert {name: array.shape for name, array in made(inputs).items()} == {
            name: tensor.shape for name, tensor in plain.graph.outputs.items()
        }
    kernels = [kernel for kernel, _ in recorder.launched]
    assert len(kernels) == 4
    assert kernels[0] is kernels[2]
    assert kernels[1] is kernels[3]
    assert kernels[0].built is kernels[2].built
