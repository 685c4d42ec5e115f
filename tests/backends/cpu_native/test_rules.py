"""cpu_native's fused rules are as near the float64 value as plain torch calls are."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.cpu_native import PLANNED, RULES, loss, native
from tests.backends.cpu_native.fused_cases import CASES, CHUNKED, GROUPS, HEADS, LORA

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES | GROUPS)
def test_planned_op(name, dtype):
    """A plan's rules, compiled kernels among them."""
    assert native.available(), "these tests want a compiler"
    op, case = (CASES | GROUPS)[name]
    case.check(PLANNED, op, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in HEADS if HEADS[name][0] == "linear_cross_entropy"])
def test_planned_head(name, dtype):
    HEADS[name][1].check(PLANNED, "linear_cross_entropy", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LORA)
def test_planned_lora_linear(name, dtype):
    LORA[name].check(PLANNED, "lora_linear", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grads", CHUNKED)
def test_planned_cross_entropy_by_chunks(grads, dtype, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ROWS", 4)
    for case in CHUNKED[grads]:
        case.check(PLANNED, "linear_cross_entropy", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fused_op(name, dtype):
    op, case = CASES[name]
    case.check(RULES, op, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_head(name, dtype):
    """Cross-entropy is fused, whatever its terms; the others are decomposed before they are differentiated, where their
    gradient would have been saved in the forward."""
    op, case = HEADS[name]
    case.check(RULES, op if op == "linear_cross_entropy" else "log_softmax", dtype)


@pytest.mark.parametrize("name", LORA)
def test_lora_linear(name):
    """Float32 alone is fused: another dtype rounds the sum of both products once, which BLAS would not."""
    LORA[name].check(RULES, "lora_linear", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grads", CHUNKED)
def test_cross_entropy_by_chunks_of_rows(grads, dtype, monkeypatch):
    """Chunks of four rows, of which the last has three."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", 4)
    for case in CHUNKED[grads]:
        case.check(RULES, "linear_cross_entropy", dtype)
