"""Tokens/s of a LoRA step beside transformers + peft: one interleaved run, the ratio's median in `extra_info`.

make bench
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

from smedjan.train.config import FinetuneConfig


@pytest.mark.parametrize("backend", ["cpu_native", "torch_reference"])
def test_lora_step_beside_peft(benchmark, lora_config: FinetuneConfig, backend: str) -> None:
    from beside_peft import interleaved

    config = replace(lora_config, backend=backend)
    pairs = benchmark.pedantic(interleaved, args=(config,), kwargs={"rounds": 5, "steps": 2}, rounds=1, iterations=1)
    benchmark.extra_info["tokens_per_s"] = [round(ours) for ours, _ in pairs]
    benchmark.extra_info["peft_tokens_per_s"] = [round(theirs) for _, theirs in pairs]
    benchmark.extra_info["ratio"] = round(median(ours / theirs for ours, theirs in pairs), 3)
    print(backend, benchmark.extra_info)
