"""bench/mac.sh, run as a Mac's owner would, on MLX's CPU build with a tiny model of 4 bits, beside the real mlx-lm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    # Without MLX's compiler, which on a CPU is a C++ compiler.
    settings = {"SMEDJAN_PYTHON": sys.executable, "MLX_DISABLE_COMPILE": "1"}
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "mac.sh"), *words],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_bench_runs_beside_mlx_lm_and_fills_its_table(tmp_path: Path) -> None:
    """Both sides in processes of their own, on one directory: first losses agree, the same greedy text comes out, and
    every figure is there."""
    words = ["--shape", "tiny-4bit", "--rounds", "1", "--steps", "1", "--sides", "smedjan", "mlx-lm"]
    done = run(*words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert {"device", "system", "mlx", "mlx_lm", "smedjan", "date"} <= result.keys()
    train, generate = result["results"]
    assert list(train["sides"]) == list(generate["sides"]) == ["smedjan", "mlx-lm"]
    for found in (*train["sides"].values(), *generate["sides"].values()):
        assert all(number > 0 for number in found.values())
    assert len(train["first_loss"]) == 2
    assert generate["same_tokens"] > 0
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines() if line.startswith("| tiny-4bit ")]
    assert [[cell.strip() for cell in row[1:]] for row in rows] == [
        ["LoRA", "smedjan"],
        ["LoRA", "mlx-lm"],
        ["prefill", "smedjan"],
        ["decode", "smedjan"],
        ["prefill", "mlx-lm"],
        ["decode", "mlx-lm"],
    ]
    assert file.with_suffix(".md").read_text() in done.stdout


def test_shapes_are_those_of_the_models_and_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters as the models' cards have them; what is planned larger than a GPU's memory does not run."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import mac
    from mac_shapes import SHAPES

    from smedjan.models.registry import read_config

    counted = {}
    for name, shape in SHAPES.items():
        shapes = read_config(shape.config, Path("config.json")).parameter_shapes().values()
        counted[name] = sum(dims[0] * (dims[1] if len(dims) > 1 else 1) for dims in shapes)
    assert counted == {"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "llama-3.1-8b-4bit": 8_030_261_248}
    smallest = mac.planned(SHAPES["qwen2.5-0.5b"])
    assert smallest > 2 * counted["qwen2.5-0.5b"], "bfloat16 weights, and what a step keeps"
    needed = {name: smallest * (turn + 1) for turn, name in enumerate(SHAPES)}
    monkeypatch.setattr(mac, "planned", lambda shape: next(n for name, n in needed.items() if SHAPES[name] is shape))
    for held, out in ((3 * smallest, 0), (3 * smallest - 1, 1), (smallest - 1, 3), (None, 0)):
        found = dict(mac.runnable(list(SHAPES), {"working_set_bytes": held}))
        assert [name for name, why in found.items() if why is not None] == list(SHAPES)[3 - out :]
