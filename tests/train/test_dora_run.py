"""Runs of DoRA: resumed to the bit, over 4 bits too, with what else adapters may be; the plan that is written down is
the step's. (Its numbers are held to peft's in `tests/hf/test_exact_llama.py` and `tests/passes/test_dora.py`.)"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import smedjan

DORA = {"method": "lora", "lora__dora": True, "lora__rank": 4, "train__steps": 4, "train__save_every": 1}
KINDS = {
    "lora": {"lora__dropout": 0.1},
    "qlora": {"method": "qlora", "train__packing": True},
    "8 bits, pissa": {"method": "qlora", "lora__bits": 8, "lora__init": "pissa_niter_4"},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_resumed_run_makes_the_same_bits(configure, kind):
    flags = {**DORA, **kind, "backend": "cpu_native"}
    whole = smedjan.finetune(configure("whole", **flags))

    class Stop(Exception):
        pass

    def on_step(event):
        if event["step"] == 3:
            raise Stop

    config = configure("stopped", **flags)
    with pytest.raises(Stop):
        smedjan.finetune(config, on_step=on_step)
    assert smedjan.finetune(replace(config, resume=True)).weights_sha256 == whole.weights_sha256


def test_what_is_written(configure, tiny):
    """peft loads the run's adapter and gives its bits; magnitudes were trained; the plan is the step's."""
    run = smedjan.finetune(configure(**DORA))
    plan = json.loads((run.run_dir / "smedjan" / "plan.json").read_text())
    assert {"dora_norm", "linear_dw", "adamw_update"} <= {row["op"] for row in plan["ops"]}
    assert plan["plan_hash"] == run.plan_hash
    loaded = smedjan.load(run.run_dir, backend="torch_reference")
    ids = [[5, 9, 30, 31]]
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    matrices = {name: weight for name, weight in base.state_dict().items() if weight.ndim == 2}
    start = {f"base_model.model.{name}": weight.norm(dim=1) for name, weight in matrices.items()}
    for name, array in loaded.session.parameters.items():
        if name.endswith("lora_magnitude_vector"):
            moved = (array - start[name.replace("lora_magnitude_vector", "weight")]).abs()
            assert float(moved.max()) > 1e-3
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, run.run_dir)(input_ids=torch.tensor(ids)).logits
    np.testing.assert_array_equal(loaded.logits(ids), theirs.numpy())
