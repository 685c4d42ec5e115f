"""Products of bfloat16 on the CPU: cpu_native's on AMX's tiles beside aten's, which are oneDNN's.

    OMP_NUM_THREADS=2 python bench/products.py [--rows 1024] [--rounds 30]

Both take turns on the same arrays; figures are medians of the rounds, the ratio that of the rounds' ratios (above 1:
ours is faster). "first" is what a shape costs aten the first time, beyond its median: a primitive, which it keeps.
Numbers are random: power may limit AMX, and zeros were seen to be multiplied up to 2.5 times as fast.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from smedjan.backends.cpu_native import amx
from smedjan.backends.planned.immediate import immediate

SHAPES = {
    "q k v": (576, 960),
    "o": (576, 576),
    "gate up": (576, 3072),
    "down": (1536, 576),
    "head, 256 rows": (576, 49152),
}
"""SmolLM2-135M's layers, in and out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if not amx.available():
        raise SystemExit("no AMX here, or no compiler")
    for name, (width, outs) in SHAPES.items():
        rows = 256 if outs > 10_000 else arguments.rows
        x, w, dy = (torch.randn(shape).bfloat16() for shape in ((rows, width), (outs, width), (rows, outs)))
        for what, a, b in (("y = x W^T", x, w.t()), ("dx = dy W", dy, w), ("dW = dy^T x", dy.t(), x)):
            print(f"{name}, {what}: {compared(a, b, arguments.rounds)}", flush=True)


def compared(a: torch.Tensor, b: torch.Tensor, rounds: int) -> str:
    made, flops = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype), 2.0 * a.numel() * b.shape[1]
    run = immediate(torch.device("cpu"))
    amx.product(run, a, b, torch.empty_like(made))

    def aten() -> None:
        torch.mm(a, b, out=made)

    def ours_all() -> None:
        for call in run.calls:
            call()

    sides = {"aten": aten, "ours": ours_all}
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, call in sides.items():
            began = time.perf_counter()
            call()
            found[side].append(time.perf_counter() - began)
    theirs, ours = (median(found[side][1:]) for side in sides)
    ratio = median(t / o for t, o in zip(found["aten"][1:], found["ours"][1:], strict=True))
    first = 1e3 * (found["aten"][0] - theirs)
    return (
        f"{flops / theirs / 1e9:.0f} GFLOP/s aten (first {first:+.1f} ms), {flops / ours / 1e9:.0f} ours, {ratio:.2f} x"
    )


if __name__ == "__main__":
    main()
