"""A training step of a tiny Llama on cpu_native: every op has a lowering, and all that it makes is within the bound."""

from __future__ import annotations

import pytest

from smedjan.backends.cpu_native import amx, amx_float32
from smedjan.passes.lora import Lora
from tests.backends.cpu_native.tiny_llama import KINDS, check_step, programs

LORA = Lora(rank=3, alpha=6.0, dropout=0.3, targets=("q_proj", "v_proj", "down_proj"))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_within_the_bound(kind, dtype, lora):
    check_step("cpu_native", kind, dtype, lora)


def test_a_tied_head_is_within_the_bound():
    check_step("cpu_native", "none", "float32", None, tie_word_embeddings=True)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_whose_products_are_all_on_amx_is_within_the_bound(kind, lora, monkeypatch):
    if not amx.available():
        pytest.skip("no AMX")
    monkeypatch.setattr(amx_float32, "LEAST", 1)
    ran = {row["lowering"] for program in programs("cpu_native", lora=lora)[:-1] for row in program.lowerings()}
    assert any(label.startswith(amx_float32.LABEL) for label in ran), ran
    check_step("cpu_native", kind, "float32", lora)


NATIVE = {"add_rms_norm", "rms_norm", "rms_norm_bwd", "glu", "glu_bwd", "qk_norm_rope", "qk_norm_rope_bwd"}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_fused_ops_stay_fused(lora):
    """Nothing between two products is more than one pass of a compiled kernel."""
    *micros, update = programs("cpu_native", lora=lora)
    for program in micros:
        ran = {row["op"]: row["lowering"] for row in program.lowerings()}
        assert all(label.startswith(("native", "aten", "view")) for label in ran.values()), ran
        own = {op for op, label in ran.items() if label.startswith("native")}
        assert own == NATIVE | {"linear_cross_entropy", "attention", "attention_bwd"}, own
    assert {row["op"] for row in update.lowerings()} == {"norm_and_clip", "adamw_bucket"}
