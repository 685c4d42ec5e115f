"""Issue 7, Shows: "a run of 30 steps that changes lowering every 10 (`torch_reference` -> `cuda_triton` under the
interpreter -> `mlx_metal`), in all six orders: the curve stays within the bound of the run that never moved; weights
survive each hand-over bit for bit; `kill -9` in every leg."

Each leg is two processes: one that dies of SIGKILL at a random step of it, and one that resumes there and is stopped by
Ctrl-C behind its tenth step. A leg is run once for all orders that begin with it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import smedjan
from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.run_dir import load_checkpoint, sha256_of
from smedjan.hf.peft import initial_adapter
from smedjan.report.history import history
from smedjan.train.config import FinetuneConfig
from smedjan.train.parts import Finetune
from tests.tolerances import bound

LOWERINGS = ("torch_reference", "cuda_triton", "mlx_metal")
STEPS, LEG, CLIP = 30, 10, 1.0
LR = {"full": 1e-3, "lora": 1e-2}
RANK, ALPHA = 4, 8

LEGS = """
import json, os, signal, sys, threading, time
import smedjan.api
from smedjan.backends import cpu_native, cuda_triton, torch_reference
from smedjan.train.config import FinetuneConfig
from smedjan.train.finetune import Interrupted

def run(flags, at, delay, end):
    def kill():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)
    def on_step(event):
        if "loss" in event and event["step"] == at:
            threading.Thread(target=kill).start()
        if "loss" in event and event["step"] == end:
            os.kill(os.getpid(), signal.SIGINT)
    try:
        smedjan.api.finetune(FinetuneConfig.from_toml(None, flags), on_step=on_step)
    except Interrupted:
        os._exit(130)

ends = []
for flags, at, delay, end in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        run(flags, at, delay, end)
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""
"""The libraries are imported once, and no operation run, before each process is forked."""


@pytest.fixture(scope="module")
def mini(tiny, tmp_path_factory):
    """V about 280, H 32, one layer, 2 heads on one group, tied: Triton's interpreter takes half a second a step."""
    directory = tmp_path_factory.mktemp("mini")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=json.loads((tiny / "config.json").read_text())["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run_config(mini, tmp_path_factory):
    root = tmp_path_factory.mktemp("relay")
    rows = root / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"hello {i} ", "completion": f"w {i % 3}"}) + "\n" for i in range(40))
    )

    def make(out, method, backend):
        flags = {
            "model": str(mini),
            "data": str(rows),
            "out": str(root / method / out),
            "method": method,
            "backend": backend,
            "train.batch_size": 1,
            "train.steps": STEPS,
            "train.save_every": 2,
            "optim.lr": LR[method],
            "optim.clip": CLIP,
            "optim.schedule": "constant",
            "optim.warmup": 0,
            "lora.rank": RANK,
            "lora.alpha": ALPHA,
        }
        return FinetuneConfig.from_toml(None, flags)

    return make


@pytest.fixture(scope="module")
def curves(run_config, mini, peer_trainer):
    """Of a method: the losses of the run that never moved, those of transformers (with peft) in float64, and the bound
    of `tests/tolerances.py`: twice the most by which its float32 losses are away from them, and the roundings of a
    loss, which alone are more than that over so few steps of so small a model."""

    def peer(parts, dtype):
        trainer = peer_trainer(mini, torch.float32, lr=LR[parts.config.method], clip=CLIP)
        if parts.lora is not None:
            settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(parts.lora.targets))
            trainer.model = get_peft_model(trainer.model, settings)
            begun = initial_adapter(parts.lora, parts._shapes, parts.config.seed)
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if parameter.requires_grad:
                        raw = begun[name.replace(".default.", ".")]
                        parameter.copy_(torch.from_numpy(to_float32(raw).reshape(raw.shape).copy()))
        trainer.model, trainer.wide = trainer.model.to(dtype), dtype == torch.float64
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        trainer.optimizer = torch.optim.AdamW(trained, lr=LR[parts.config.method], weight_decay=0.0, foreach=False)
        return trainer

    @cache
    def make(method):
        config = run_config("stayed", method, "torch_reference")
        smedjan.finetune(config)
        parts, made = Finetune(config), {}
        for dtype in (torch.float64, torch.float32):
            trainer = peer(parts, dtype)
            made[dtype] = np.array([trainer.step(parts.steps.batches_for_step(step)) for step in range(STEPS)])
        truth, theirs = (torch.from_numpy(made[dtype]) for dtype in (torch.float64, torch.float32))
        return losses_of(config.out), made[torch.float64], bound(truth, theirs, torch.float32)

    return make


def losses_of(run):
    events = [json.loads(line) for line in (run / "smedjan" / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1))
    return np.array([event["loss"] for event in steps])


def flags_of(config):
    """As `from_toml` takes them: a section's are nested."""
    return {name: value for name, value in config.to_dict().items() if value is not None}


@pytest.fixture(scope="module")
def after(run_config):
    """The config of a run that went through these lowerings, a leg on each."""

    @cache
    def run(method, *path):
        config = run_config("-".join(path), method, path[-1])
        if path[:-1]:
            before = run(method, *path[:-1])
            shutil.copytree(before.out, config.out)
            same_bits(before, path[-1])
        config = replace(config, resume=True)
        chance, start = random.Random(f"{method} {path}"), LEG * (len(path) - 1)
        at = start + chance.randint(1, LEG - 3)
        # While the next step is computed, or a checkpoint written, in whatever time this machine takes for one
        jobs = [(flags_of(config), at, chance.uniform(0, 0.02), 0), (flags_of(config), 0, 0.0, start + LEG)]
        child = subprocess.run(
            [sys.executable, "-c", LEGS],
            input=json.dumps(jobs),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert child.returncode == 0, child.stderr
        last = 0 if len(path) == len(LOWERINGS) else 130
        assert json.loads(child.stdout) == [-signal.SIGKILL, last], child.stderr
        assert load_checkpoint(config.out).step == start + LEG
        return config

    return run


def same_bits(config, backend):
    """Weights, moments and step in the arrays of the next lowering are those that the last one left."""
    found = load_checkpoint(config.out)
    trainer = Finetune(replace(config, backend=backend), started=found.state["started"]).trainer()
    assert sha256_of(trainer.weights()) != sha256_of(found.weights), "they were trained"
    trainer.restore(found.weights, found.optimizer)
    assert sha256_of(trainer.weights()) == sha256_of(found.weights)
    assert sha256_of(trainer.optimizer_state()) == sha256_of(found.optimizer)


# Each lowering in each place is in every run of the tests; the other three orders are slow
ORDERS = [
    pytest.param(*order, marks=() if "".join(order) in 2 * "".join(LOWERINGS) else pytest.mark.slow)
    for order in permutations(LOWERINGS)
]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("first", "second", "third"), ORDERS)
def test_relay(after, curves, method, first, second, third):
    stayed, truth, most = curves(method)
    config = after(method, first, second, third)
    losses = losses_of(config.out)
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0], "it learns"
    for name, curve in (("the run that never moved", stayed), ("float64", truth)):
        off = float(np.abs(losses - curve).max())
        assert off <= most, f"{first}, {second}, {third}: {off:.3e} from {name}, the bound is {most:.3e}"
    legs = history(config.out).legs
    assert [leg.backend for leg in legs] == [first, first, second, second, third, third], "killed, and resumed"
    assert [leg.last_step for leg in legs[1::2]] == [LEG, 2 * LEG, STEPS]
    assert [leg.steps + other.steps for leg, other in zip(legs[::2], legs[1::2], strict=True)] == [LEG] * 3


@pytest.mark.parametrize("method", ["full", "lora"])
def test_another_seed_is_out_of_the_bound(curves, run_config, method):
    """The bound tells runs apart: the same rows in another order are another curve."""
    _, truth, most = curves(method)
    config = run_config("another", method, "torch_reference")
    smedjan.finetune(replace(config, seed=1))
    assert float(np.abs(losses_of(config.out) - truth).max()) > 100 * most
