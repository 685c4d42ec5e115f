"""What `finetune --dry-run` predicts beside what a run measures: seconds of a step, and peak memory above the imports.

    python bench/plan.py MODEL [--cases lora-float32,full-bfloat16] [--backend cpu_native] [--batch 4] [--length 128]

Each case is a process of its own, which plans the run and then trains it for a few steps on rows that fill the length,
so that every step is as long as the one that is planned. A step's seconds are the median of all but the first. The
memory is the process's (Linux); on a GPU, torch's peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

CASES = "lora-float32,lora-bfloat16,qlora-float32,full-float32,full-bfloat16"


def measure(given: argparse.Namespace, case: str) -> dict[str, Any]:
    """Of one case, in this process."""
    import smedjan
    import smedjan.train.finetune
    import smedjan.train.plan
    from smedjan.runtime.select import backend
    from smedjan.train.config import FinetuneConfig

    method, dtype = case.split("-")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text((json.dumps({"text": "one two three " * given.length}) + "\n") * given.batch)
        flags = {
            **{"model": given.model, "data": rows, "out": Path(folder) / "run", "method": method, "dtype": dtype},
            **{"backend": given.backend, "train.batch-size": given.batch, "train.grad-accum": given.accumulate},
            **{"train.max-length": given.length, "train.too-long": "truncate", "train.steps": given.steps},
        }
        config, device = FinetuneConfig.from_toml(None, flags), backend(given.backend)
        seen: list[dict[str, Any]] = []
        device.reset_peak_memory()
        before = device.peak_memory()
        smedjan.finetune(config, on_step=seen.append)
        peak = device.peak_memory() - before
        plan = smedjan.plan(config)
    seconds = [event["tokens"] / event["tokens_per_s"] for event in seen if "tokens_per_s" in event]
    return {
        "case": case,
        "predicted_s": plan.step_seconds,
        "measured_s": median(seconds[1:]),
        "planned_bytes": plan.planned_bytes,
        "peak_bytes": peak,
    }


def shown(found: dict[str, Any]) -> str:
    predicted, planned = found["predicted_s"], found["planned_bytes"]
    step = "not predicted"
    if predicted is not None:
        step = f"{predicted:8.3f} s predicted, {found['measured_s']:8.3f} s measured, "
        step += f"{predicted / found['measured_s'] - 1:+7.1%}"
    memory = f"{planned / 1e6:8.0f} MB planned, {found['peak_bytes'] / 1e6:8.0f} MB measured, "
    return f"{found['case']:16}{step}; {memory}{planned / found['peak_bytes'] - 1:+7.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--backend", default="cpu_native")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps < 2:
        parser.error("--steps: give 2 or more; the first is not counted")
    if given.worker:
        print(json.dumps(measure(given, given.worker)))
        return
    for case in given.cases.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", case]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{case}: {done.stderr}")
        print(shown(json.loads(done.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
