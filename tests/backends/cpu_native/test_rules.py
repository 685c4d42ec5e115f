"""cpu_native's fused rules are as near the float64 value as plain torch calls are."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.cpu_native import RULES, loss
from tests.backends.cpu_native.fused_cases import CASES, HEADS, LORA, _loss

DTYPES = [torch.float32, torch.bfloat16]


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
@pytest.mark.parametrize("grads", ["", "x", "w", "xw"])
def test_cross_entropy_by_chunks_of_rows(grads, dtype, monkeypatch):
    """Chunks of four rows, of which the last has three."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", 4)
    _loss(grads, rows=11).check(RULES, "linear_cross_entropy", dtype)
    _loss(grads, rows=11, z_loss=0.05, smoothing=0.1).check(RULES, "linear_cross_entropy", dtype)
