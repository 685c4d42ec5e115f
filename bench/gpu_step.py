"""Whole training steps on an NVIDIA GPU beside transformers + Liger Kernel + peft: rows of bench/results' JSON.

`python bench/gpu_step.py RESULTS.json`, usually through `bench/gpu.sh`. Both sides train a model of random weights and
of the same shape on the same packed rows, without evaluation or files: tokens/s (median of the steps behind the
warm-up, which holds compilation and capture), peak memory above nothing, and for ours the share of a measured matrix
product's rate that the FLOPs of the graph that ran come to. transformers runs with Liger's kernels, its default
attention, and once more with gradient checkpointing (recompute everything), which is what Unsloth's published memory
figures rest on.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu_kernels import peaks
from gpu_result import merge

from smedjan.models.registry import read_config
from smedjan.optim.adamw import AdamW
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session
from smedjan.train.step import Trainer

QWEN3_600M: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
}
"""Qwen/Qwen3-0.6B's config.json, as far as it decides the computation."""

BATCH, LENGTH, WARM, STEPS, RANK = 8, 1024, 4, 10, 16


@dataclass(frozen=True, kw_only=True)
class Result:
    method: str
    who: str
    tokens_per_s: float
    peak_bytes: int
    matmul_share: float | None = None


def batch_of(seed: int) -> SimpleNamespace:
    """Rows of documents of 64 to 512 tokens, every token trained."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, QWEN3_600M["vocab_size"], (BATCH, LENGTH))
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row in range(BATCH):
        begin, document = 0, 0
        while begin < LENGTH:
            end = min(LENGTH, begin + int(generator.integers(64, 512)))
            segments[row, begin:end], positions[row, begin:end] = document, np.arange(end - begin)
            begin, document = end, document + 1
    labels = np.roll(ids, -1, axis=1)
    labels[:, -1] = -100
    return SimpleNamespace(
        input_ids=ids,
        position_ids=positions,
        labels=labels,
        segment_ids=segments,
        kind="packed",
        trained_tokens=int((labels != -100).sum()),
    )


def timed(step: Callable[[int], None]) -> tuple[float, int]:
    """Tokens/s and peak bytes of the steps behind the warm-up."""
    seconds = []
    for number in range(1, WARM + STEPS + 1):
        if number == WARM + 1:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return BATCH * LENGTH / median(seconds[WARM:]), torch.cuda.max_memory_allocated()


def ours(method: str, matmul: float) -> Result:
    config = read_config(QWEN3_600M, Path("config.json"))
    on = backend("cuda_triton")
    lora = None
    shapes = {name: (shape, torch.bfloat16) for name, shape in config.parameter_shapes().items()}
    if method == "lora":
        lora = Lora(rank=RANK, alpha=32.0, dropout=0.0, targets=config.linear_layers())
        shapes |= {name: (shape, torch.float32) for name, shape in lora.shapes(config.parameter_shapes()).items()}
    parameters = {
        name: torch.randn(shape, dtype=dtype, device="cuda") * 0.02 for name, (shape, dtype) in shapes.items()
    }
    session = Session(on, config, parameters, "bfloat16", lora=lora)
    names = [name for name in parameters if lora is None or ".lora_" in name]
    trainer = Trainer(session, names, AdamW(clip=1.0, master=False))
    batches = [batch_of(seed) for seed in range(4)]
    speed, peak = timed(lambda number: void(trainer.step([batches[number % 4]], number=number, lr=1e-5)))
    flops = sum(program.cost.flops for program in (*session.programs.values(), trainer.update))
    share = flops / (BATCH * LENGTH) * speed / matmul
    return Result(method=method, who="smedjan", tokens_per_s=speed, peak_bytes=peak, matmul_share=share)


def void(_: object) -> None:
    pass


def theirs(method: str, *, checkpointing: bool) -> Result:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    from transformers import AutoConfig, AutoModelForCausalLM

    apply_liger_kernel_to_qwen3()
    settings = {key: value for key, value in QWEN3_600M.items() if key not in ("model_type", "architectures")}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **settings), dtype=torch.bfloat16)
    model = model.cuda()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batches = [batch_of(seed) for seed in range(4)]

    def step(number: int) -> None:
        batch = batches[number % 4]
        ids, positions = (torch.from_numpy(a).cuda() for a in (batch.input_ids, batch.position_ids))
        model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    speed, peak = timed(step)
    who = "transformers + Liger" + (", checkpointing" if checkpointing else "")
    return Result(method=method, who=who, tokens_per_s=speed, peak_bytes=peak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON file of this run, which is added to")
    path = parser.parse_args().results
    torch.manual_seed(0)
    _, matmul = peaks()
    runs: list[Callable[[], Result]] = [lambda: ours("lora", matmul), lambda: ours("full", matmul)]
    if all(find_spec(name) for name in ("liger_kernel", "transformers")):
        methods = ["full", "lora"] if find_spec("peft") else ["full"]
        runs += [
            lambda method=method, again=again: theirs(method, checkpointing=again)  # type: ignore[misc]
            for method in methods
            for again in (False, True)
        ]
    else:
        print("liger_kernel or transformers is not here: no peer")
    results = []
    for run in runs:
        results.append(run())
        print(results[-1], flush=True)
        merge(path, {"steps": [asdict(result) for result in results]})
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
