"""LoRA, prefill and decode on a Mac beside mlx-lm: tokens/s and peak memory, by interleaved rounds.

    bench/mac.sh [--shape qwen2.5-0.5b ...] [--rounds 3] [--steps 6] [--out FOLDER]

Models of the shapes of Qwen2.5-0.5B, Qwen2.5-1.5B (bfloat16) and Llama-3.1-8B (4 bits), with random weights that are
written to a scratch folder, 6 GB at most; nothing is downloaded. Each turn of each side is a process of its own:
two models are never in memory at once. Sides take turns, and each goes first in its round. Medians; a ratio is the
median of the rounds' ratios. First losses must agree. A shape that smedjan plans larger than what the GPU holds is left
out, and said so. Prints a table, and writes it as FOLDER/<device>-<date>.md and .json (default bench/results).

`--shape tiny`, which any machine with MLX runs, is the test of the bench itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from math import isclose
from pathlib import Path
from statistics import median
from typing import Any

from mac_shapes import SHAPES, TINY, Shape, write

SIDES = ("smedjan", "mlx-lm", "mlx-lm, checkpointed")
"""The third is mlx-lm's training with --grad-checkpoint."""

ALL = {**SHAPES, **TINY}
TRAIN, GENERATE = "LoRA step", "generate"
COLUMNS = {"tokens_per_s": "LoRA", "prefill_tokens_per_s": "prefill", "decode_tokens_per_s": "decode"}


def planned(shape: Shape) -> int:
    """Bytes of the LoRA step, by smedjan's planner."""
    from smedjan.backends.base import Forms
    from smedjan.backends.mlx_metal import MlxBackend
    from smedjan.models.registry import read_config
    from smedjan.train.outline import planned_bytes
    from smedjan.train.plan import outline_of

    config = read_config(shape.config, Path("config.json"))
    narrow = {config.embedding, config.head, *config.linear_weights()} if shape.affine else ()
    outline, form = outline_of(
        config,
        MlxBackend(compiled=True),
        dtype="bfloat16",
        batch=shape.batch,
        length=shape.length,
        method="qlora" if shape.affine else "lora",
        affine={name: shape.affine for name in narrow if shape.affine},
    )
    return planned_bytes(outline, outline.smallest(form), forms=Forms(lengths=1, rows=1))


def machine() -> dict[str, Any]:
    import mlx.core as mx

    info = mx.device_info()
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": str(info["device_name"]),
        "memory_bytes": info.get("memory_size"),
        "working_set_bytes": info.get("max_recommended_working_set_size"),
        "system": f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.system(),
        "metal": mx.metal.is_available(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "smedjan": done.stdout.strip()[:12] if done.returncode == 0 else "unknown",
        "date": date.today().isoformat(),
    }


def turn(side: str, work: str, name: str, folder: Path, steps: int) -> dict[str, Any]:
    """In a process of its own. An error there (a Mac that runs out of memory) is the turn's result."""
    command = [sys.executable, __file__, "--worker", side, "--work", work, "--shape", name, "--out", str(folder)]
    done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def worker(given: argparse.Namespace) -> None:
    from mac_sides import generation, training

    (name,) = given.shape
    if given.work == TRAIN:
        found = training(given.worker, ALL[name], given.out, given.steps)
    else:
        found = generation(given.worker, ALL[name], given.out)
    print(json.dumps(found))


def measure(name: str, work: str, sides: Sequence[str], folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """{side: medians}, and the ratios of smedjan to each other one."""
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in (*sides[number % len(sides) :], *sides[: number % len(sides)]):
            turns[side].append(turn(side, work, name, folder, steps))
    ran = {side: found for side, found in turns.items() if not any("error" in each for each in found)}
    result: dict[str, Any] = {"shape": name, "work": work, "rounds": rounds, "sides": {}, "ratio": {}}
    for side, found in turns.items():
        if side not in ran:
            result["sides"][side] = next(each for each in found if "error" in each)
            continue
        numbers = [key for key in found[0] if key.endswith(("_per_s", "_bytes"))]
        result["sides"][side] = {key: median(each[key] for each in found) for key in numbers}
    for side in ran:
        if side != sides[0] and sides[0] in ran:
            result["ratio"][side] = {
                key: median(a[key] / b[key] for a, b in zip(ran[sides[0]], ran[side], strict=True))
                for key in COLUMNS
                if key in ran[side][0]
            }
    losses = [found[0]["loss"] for found in ran.values() if "loss" in found[0]]
    if losses:
        # bfloat16 on both sides, which round in other places: as bench/train.py has it
        assert all(isclose(loss, losses[0], rel_tol=3e-2) for loss in losses), f"{name}: not one computation, {losses}"
        result["first_loss"] = losses
    else:
        # Greedy text of random weights may part where two logits are near, and goes its own way from there.
        texts = [found[0]["tokens"] for found in ran.values()]
        result["same_tokens"] = next(
            (n for n, pair in enumerate(zip(*texts, strict=True)) if len({*pair}) > 1), len(texts[0])
        )
    return result


def table(results: Sequence[dict[str, Any]], left_out: dict[str, str]) -> str:
    lines = ["| shape | | side | tokens/s | smedjan is | peak |", "|---|---|---|---|---|---|"]
    for result in results:
        for side, found in result["sides"].items():
            for key, what in COLUMNS.items():
                if "error" in found:
                    if what != "prefill" and (what == "LoRA") == (result["work"] == TRAIN):
                        lines.append(f"| {result['shape']} | {what} | {side} | {found['error'][:60]} | | |")
                elif key in found:
                    ratio = result["ratio"].get(side, {}).get(key)
                    cell = "" if ratio is None else f"{ratio:.2f} x"
                    peak = f"{found['peak_bytes'] / 1e9:.2f} GB"
                    lines.append(f"| {result['shape']} | {what} | {side} | {found[key]:.1f} | {cell} | {peak} |")
    lines += [f"| {name} | all | left out | {why} | | |" for name, why in left_out.items()]
    return "\n".join(lines)


def runnable(names: Sequence[str], about: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Each shape, with why it is left out."""
    for name in names:
        needed, held = planned(ALL[name]), about["working_set_bytes"]
        fits = held is None or needed <= held
        yield name, None if fits else f"{needed / 1e9:.1f} GB planned, the GPU holds {held / 1e9:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(ALL), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given)
        return
    about = machine()
    if not about["metal"] and set(given.shape) - set(TINY):
        raise SystemExit("MLX has no Metal here: this bench is for Macs with Apple silicon (--shape tiny tests it)")
    results, left_out = [], {}
    for name, why in runnable(given.shape, about):
        if why is not None:
            left_out[name] = why
            print(f"{name}: {why}: left out", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            write(ALL[name], folder)
            for work, able in ((TRAIN, SIDES), (GENERATE, SIDES[:2])):
                sides = [side for side in able if side in given.sides]
                results.append(measure(name, work, sides, folder, given.rounds, given.steps))
                print(f"{name}: {work} done", file=sys.stderr)
    shown = table(results, left_out)
    head = f"{about['device']}, {about['system']}, MLX {about['mlx']}, mlx-lm {about['mlx_lm']}, "
    head += f"smedjan {about['smedjan']}, {about['date']}"
    given.out.mkdir(parents=True, exist_ok=True)
    stem = given.out / f"{re.sub(r'[^a-z0-9]+', '-', about['device'].lower()).strip('-')}-{about['date']}"
    stem.with_suffix(".json").write_text(
        json.dumps({**about, "results": results, "left_out": left_out}, indent=1) + "\n"
    )
    stem.with_suffix(".md").write_text(f"{head}\n\n{shown}\n")
    print(f"{head}\n\n{shown}")


if __name__ == "__main__":
    main()
