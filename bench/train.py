"""Training steps on the CPU beside transformers (+ peft): tokens/s and peak memory, one interleaved run.

    python bench/train.py MODEL ROWS.jsonl [--cases lora-float32,full-float32] [--rounds 5] [--json FILE]

Each side is a process of its own, which takes its turn when it is told to: smedjan (`cpu_native`), transformers with
glibc's malloc as it is, and with thresholds so high that no freed memory goes back to the system, and litgpt, where
--litgpt says that it is. All see the same rows with the same adapters, AdamW and clipping, on as many threads; their
first losses must agree. A ratio is the median of the rounds' ratios. Table A: unpadded rows, every token trained. Table
B: rows of prompt and completion as they are, padded to the longest (by smedjan to a multiple of 16, as its runs do),
completions trained; of new lengths, so that what a new shape costs is in it. Peak memory is resident bytes above what
the process held once its libraries were imported.

A case that ends in -int8 is another computation: the frozen base's forward products are of 8-bit integers. It runs
beside smedjan's own without them, its first loss is shown beside that one's and not held to it, and its ratio is none
against a peer. It is run where --cases names it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from math import isclose
from pathlib import Path
from statistics import median
from typing import Any

ROWS, LENGTH, RANK = 8, 128, 16
RAISED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}
SIDES = {"smedjan": ("smedjan", {}), "transformers": ("peer", {}), "transformers, raised": ("peer", RAISED)}
PLAIN = "smedjan, without int8"
LITGPT = "litgpt, raised"
"""Where --litgpt says where that lies (bench/litgpt_side.py)."""
OTHER_SIDES = {"smedjan": ("smedjan", {}), PLAIN: ("plain", {})}
"""Of cases that end in -int8."""
CASES = ("lora-float32", "full-float32", "lora-bfloat16", "full-bfloat16")


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Worker:
    """The process of one side, at the other end of two pipes."""

    def __init__(self, side: str, arguments: list[str]) -> None:
        kind, environment = {**SIDES, **OTHER_SIDES, LITGPT: ("litgpt", RAISED)}[side]
        command = [sys.executable, __file__, *arguments, "--worker", kind]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def ask(self, question: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a side died with exit code {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def batches(model: str, rows: Path, table: str, count: int, pad_to: int) -> list[Any]:
    """The batches of the first steps: the same rows on each side."""
    from smedjan.data.dataset import TokenDataset
    from smedjan.data.formats import read_rows
    from smedjan.data.mask import Example, tokenize_rows
    from smedjan.hf.tokenizer import load_tokenizer

    examples = tokenize_rows(read_rows(rows, "train"), load_tokenizer(Path(model)), max_length=1024).examples
    if table == "A":
        import numpy as np

        source = examples[0].source
        ids = np.concatenate([example.input_ids for example in examples])
        wanted = count * ROWS * LENGTH
        ids = np.resize(ids, wanted).reshape(-1, LENGTH)
        examples = [Example(input_ids=row, labels_mask=np.arange(LENGTH) > 0, source=source) for row in ids]
    steps = TokenDataset(examples).steps(seed=0, batch_size=ROWS, steps=count, max_length=1024, pad_to=pad_to)
    return [steps.batches_for_step(number)[0] for number in range(count)]


def work(arguments: argparse.Namespace) -> None:
    """One side: a step for each number on stdin."""
    method, dtype, *other = arguments.cases.split("-")
    int8 = other == ["int8"] and arguments.worker != "plain"
    if arguments.worker == "peer":
        import peft  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM  # noqa: F401

    if arguments.worker == "litgpt":
        import litgpt_side

        litgpt_side.import_from(arguments.litgpt)

    from smedjan.train.evaluation import PAD_TO

    pad_to = 1 if arguments.worker in ("peer", "litgpt") else PAD_TO
    given = batches(arguments.model, arguments.rows, arguments.table, arguments.rounds * arguments.steps + 2, pad_to)
    if arguments.worker != "peer":
        import torch  # noqa: F401

    baseline = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    side: Any
    if arguments.worker == "peer":
        side = _peer(arguments.model, method, dtype)
    elif arguments.worker == "litgpt":
        side = litgpt_side.LitGPT(arguments.model, method, dtype)
    else:
        side = _ours(arguments, method, dtype, int8)
    for line in sys.stdin:
        first, count = map(int, line.split())
        began = time.perf_counter()
        losses = [side.step(given[first + offset], first + offset + 1) for offset in range(count)]
        seconds = time.perf_counter() - began
        tokens = sum(given[first + offset].tokens for offset in range(count))
        peak = resident("VmHWM") - baseline
        answer = {"loss": losses[0], "tokens_per_s": tokens / seconds, "peak": peak, "plan_hash": side.plan_hash()}
        print(json.dumps(answer), flush=True)


class _Ours:
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def step(self, batch: Any, number: int) -> float:
        loss, _ = self.trainer.step([batch], number=number, lr=1e-4)
        return loss

    def plan_hash(self) -> str:
        return next(iter(self.trainer.session.programs.values())).plan_hash


def _ours(arguments: argparse.Namespace, method: str, dtype: str, int8: bool) -> _Ours:
    from smedjan.train.config import FinetuneConfig, LoraConfig, OptimConfig, TrainConfig
    from smedjan.train.parts import Finetune

    config = FinetuneConfig(
        model=arguments.model,
        data=arguments.rows,
        out=Path("unused"),
        method=method,
        dtype=dtype,
        backend="cpu_native",
        train=TrainConfig(batch_size=ROWS, steps=1, int8_forward=int8),
        optim=OptimConfig(lr=1e-4, master=False),
        lora=LoraConfig(rank=RANK),
    )
    return _Ours(Finetune(config).trainer())


class _Peer:
    def __init__(self, model: Any, trained: list[Any], optimizer: Any) -> None:
        self.model, self.trained, self.optimizer = model, trained, optimizer

    def step(self, batch: Any, number: int) -> float:
        import torch

        ids = torch.tensor(batch.input_ids)
        labels = torch.full_like(ids, -100)
        labels[:, 1:] = torch.tensor(batch.labels[:, :-1])  # a Batch's labels are shifted, transformers shifts its own
        mask = None if batch.attention_mask is None else torch.tensor(batch.attention_mask)
        out = self.model(
            input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=batch.trained_tokens, use_cache=False
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.loss.item()

    def plan_hash(self) -> None:
        return None


def _peer(model: str, method: str, dtype: str) -> _Peer:
    import torch
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        made = get_peft_model(
            made, LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
        )
    made.train()
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    return _Peer(made, trained, torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0))


def run(case: str, table: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case: every side's turns, round by round."""
    shared = [arguments.model, str(arguments.rows), "--cases", case, "--table", table]
    shared += ["--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
    other = case.endswith("-int8")
    sides = list(OTHER_SIDES if other else SIDES)
    if arguments.litgpt and not other:
        shared += ["--litgpt", arguments.litgpt]
        sides.append(LITGPT)
    workers = {side: Worker(side, shared) for side in sides}
    firsts = {side: worker.ask("0 2") for side, worker in workers.items()}  # builds programs, warms caches
    losses = [first["loss"] for first in firsts.values()]
    near = 1e-4 if case.endswith("float32") and "bf" not in case else 3e-2
    same = other or all(isclose(loss, losses[0], rel_tol=near) for loss in losses)
    assert same, f"{case}: not the same computation, {losses}"
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
    for turn in range(arguments.rounds):
        for side, worker in _turned(workers, turn):
            found[side].append(worker.ask(f"{2 + turn * arguments.steps} {arguments.steps}"))
    for worker in workers.values():
        worker.close()
    speeds = {side: [answer["tokens_per_s"] for answer in answers] for side, answers in found.items()}
    peaks = {side: answers[-1]["peak"] for side, answers in found.items()}
    ours = speeds["smedjan"]
    return {
        "case": case,
        "table": table,
        "another_computation": other,
        "first_loss": dict(zip(workers, losses, strict=True)),
        "plan_hash": found["smedjan"][0]["plan_hash"],
        "tokens_per_s": {side: median(speed) for side, speed in speeds.items()},
        "ratio": {
            side: median(a / b for a, b in zip(ours, speeds[side], strict=True)) for side in speeds if side != "smedjan"
        },
        "peak": peaks,
        "peak_ratio": {side: peaks["smedjan"] / peak for side, peak in peaks.items() if side != "smedjan"},
    }


def _turned(workers: dict[str, Worker], turn: int) -> Iterator[tuple[str, Worker]]:
    """Each side goes first in turn, so that none always follows the same one."""
    sides = list(workers.items())
    yield from sides[turn % len(sides) :] + sides[: turn % len(sides)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--table", default="AB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--litgpt", help="the folder in which litgpt is installed (bench/litgpt_side.py)")
    parser.add_argument("--worker", choices=("smedjan", "plain", "peer", "litgpt"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    rows = []
    for case in arguments.cases.split(","):
        for table in arguments.table:
            rows.append(run(case, table, arguments))
            print(json.dumps(rows[-1], indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
