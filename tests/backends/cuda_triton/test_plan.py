"""Issue 5, Shows: "`graph --plan` of a fine-tuning step (full, LoRA, QLoRA) of each family on this backend: every op is
a kernel or in the named cuBLAS / cuDNN set." """

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from smedjan.backends.cuda_triton.table import LIBRARIES
from smedjan.errors import BackendError
from smedjan.graph.program import Program
from smedjan.models.registry import ARCHITECTURES, read_config
from smedjan.runtime.select import backend
from smedjan.train.plan import step_of
from tests.families import ALL, CASES, make_model

METHODS = ("full", "lora", "qlora")


def programs(family: str, case: str, method: str | None, **options: Any) -> list[Program]:
    data = {**AutoConfig.for_model(family, **CASES[family][case]).to_dict()}
    data["architectures"] = [ARCHITECTURES[family].ARCHITECTURE]
    options = {"dtype": "bfloat16", "batch": 2, "length": 16, **options}
    return step_of(read_config(data, Path("config.json")), backend("cuda_triton"), method=method, **options)


@pytest.mark.parametrize("packing", [False, True], ids=["causal", "packed"])
@pytest.mark.parametrize("method", [*METHODS, None], ids=[*METHODS, "logits"])
@pytest.mark.parametrize(("family", "case"), ALL, ids=str)
def test_every_op_is_a_kernel_or_a_named_library_s(family, case, method, packing):
    for program in programs(family, case, method, packing=packing):
        for row in program.lowerings():
            assert row["lowering"].startswith(("triton ", "view", *LIBRARIES)), row
        for call in program.recorded():
            assert call.grid or call.name.startswith(LIBRARIES), call.name
        assert program.peak_bytes >= sum(tensor.nbytes for tensor in program.graph.inputs.values())


def test_the_command_plans_without_a_gpu(tmp_path):
    """No GPU, no interpreter: `graph --plan` says what would run, finetune says in one line that it cannot."""
    model = make_model("llama", CASES["llama"]["plain"])
    model.save_pretrained(tmp_path / "model")
    words = [sys.executable, "-m", "smedjan", "graph", str(tmp_path / "model"), "--plan", "--backend", "cuda_triton"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([*words, "--json", "--method", "lora"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert {row["op"] for row in made["ops"]} >= {"lora_linear_group", "flash_attention", "adamw_bucket"}
    assert made["launches"]["attention_fwd"] == model.config.num_hidden_layers
    assert made["planned_bytes"] > 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_memory_decides_what_is_kept(method):
    """Nothing is given up while all fits; then norms and activations, whole blocks, the host; then one clear error."""
    options = {"batch": 8, "length": 64, "packing": True}
    micro, update = programs("llama", "plain", method, **options)
    assert micro.memory() == []
    state = sum(t.nbytes for name, t in update.graph.inputs.items() if name.startswith(("exp_avg", "master")))
    given = sum(tensor.nbytes for tensor in micro.graph.inputs.values())
    told = {}
    for share in (1.0, 0.85, 0.6):
        memory = given + int(share * (micro.peak_bytes - given))
        fitted = programs("llama", "plain", method, memory=memory + state, **options)[0]
        assert fitted.peak_bytes <= memory
        told[share] = {row["what"] + (" block" if row["of"].startswith("layers") else "") for row in fitted.memory()}
    assert told[1.0] == set()
    assert told[0.85] == {"recompute"}
    assert "recompute block" in told[0.6]
    with pytest.raises(BackendError, match=r"memory.*GB, recomputed and offloaded.*--method lora"):
        programs("llama", "plain", method, memory=given + state, **options)
