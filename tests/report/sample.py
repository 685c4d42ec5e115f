"""What a run directory holds when every section of the report has data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 4.0 / step,
        "grad_norm": 1.5 / step,
        "lr": 1e-3 * step / 60,
        "tokens": 400,
        "trained_tokens": 50,
        "tokens_per_s": 270.0 + step,
        "peak_bytes": 2_345_000_000,
    }
    for step in range(1, 61)
]
EVALS: list[dict[str, Any]] = [{"step": 30, "eval_loss": 0.2718}, {"step": 60, "eval_loss": 0.3141}]
FILES: dict[str, dict[str, Any]] = {
    "run": {
        "title": "Notice to identifier",
        "subtitle": "A 135M model",
        "notes": ["Rules by ScanCode, CC-BY-4.0."],
        "versions": {"smedjan": "0.1.0", "torch": "2.13.0"},
        "backend": "cpu_native",
        "exact": False,
        "plan_hash": "4be1d0c92f7a",
        "weights_sha256": "ab12" * 16,
        "rows": {"kept": 1200, "truncated": 3, "dropped": 0},
        "trained_share": 0.137,
        "config": {"model": "base", "optim": {"lr": 0.001}, "lora": {"rank": 16, "targets": ["q_proj", "v_proj"]}},
    },
    "eval": {
        "n": 300,
        "nll": 0.0612,
        "perplexity": 1.0631,
        "name": "SmolLM2 + LoRA",
        "exact_match": 0.943,
        "ci95": [0.917, 0.967],
        "baselines": [
            {"name": "majority", "exact_match": 0.187, "ci95": [0.143, 0.23]},
            {"name": "tf-idf", "exact_match": 0.867, "ci95": [0.827, 0.903]},
        ],
        "difference": {"over": "tf-idf", "estimate": 0.076, "ci95": [0.041, 0.113]},
        "samples": [
            {"prompt": "first notice\nSPDX: ", "expected": "MIT", "answer": "MIT"},
            {"prompt": "second notice\nSPDX: ", "expected": "ISC", "answer": "MIT"},
            {"prompt": "third notice\nSPDX: ", "expected": "ISC", "answer": "MIT"},
            {"prompt": "fourth notice\nSPDX: ", "expected": "GPL-2.0-only", "answer": ""},
        ],
    },
    "bench": {
        "subject": "smedjan",
        "baseline": "transformers + peft",
        "what": "LoRA steps",
        "machine": "2 cores",
        "rounds": [[300, 200], [330, 220], [280, 200]],
    },
    "parity": {
        "backend": "torch_reference",
        "cases": [
            {
                "name": "sdpa float32 logits padding=left",
                "attention": "sdpa",
                "dtype": "float32",
                "mode": "logits",
                "batch": 2,
                "padding": "left",
                "equal": True,
                "max_abs": 0.0,
                "max_ulp": 0,
                "error": 0.0,
                "bound": 0.0,
            },
            {
                "name": "eager bfloat16 gradients padding=none",
                "attention": "eager",
                "dtype": "bfloat16",
                "mode": "gradients",
                "batch": 2,
                "padding": "none",
                "equal": False,
                "max_abs": 3.2e-5,
                "max_ulp": 2,
                "error": 3.3e-6,
                "bound": 8.1e-6,
            },
            {
                "name": "sdpa float32 decode padding=none",
                "attention": "sdpa",
                "dtype": "float32",
                "mode": "decode",
                "batch": 2,
                "padding": "none",
                "equal": False,
                "max_abs": 0.5,
                "max_ulp": 9,
                "error": 0.25,
                "bound": 0.0,
            },
        ],
        "skipped": [{"name": "flash", "reason": "no such path"}],
    },
    "plan": {
        "nodes": 1604,
        "flops_per_token": 8.4e8,
        "planned_bytes": 1_900_000_000,
        "backend": "cpu_native",
        "ops": [
            {"op": "linear", "count": 211, "lowering": "aten.mm"},
            {"op": "rms_norm", "count": 61, "lowering": "kernel"},
        ],
    },
}


def write_run(folder: Path, log: str, files: dict[str, Any]) -> Path:
    inside = folder / "run" / "smedjan"
    inside.mkdir(parents=True)
    (inside / "log.jsonl").write_text(log, encoding="utf-8")
    for name, value in files.items():
        (inside / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder / "run"


def log_text(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
