"""Products on the CPU: cpu_native's on AMX's tiles beside aten's, which are oneDNN's of bfloat16 and MKL's of float32.

    OMP_NUM_THREADS=2 python bench/products.py [--dtype float32] [--rows 1024] [--rounds 30]

Both take turns on the same arrays; figures are medians of the rounds, the ratio that of the rounds' ratios (above 1:
ours is faster). "first" is what a shape costs aten the first time, beyond its median: a primitive, which it keeps.
Numbers are random: power may limit AMX. "error" is |made - true| / |true| in Euclidean norms, in units of 2^-24, of
aten's and of ours: what is true is computed in float64, for products of float32 up to 2^31 multiplications.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from smedjan.backends.cpu_native import amx, amx_float32
from smedjan.backends.planned.immediate import immediate

SHAPES = {
    "q k v": (576, 960),
    "o": (576, 576),
    "gate up": (576, 3072),
    "down": (1536, 576),
    "head, 256 rows": (576, 49152),
}
"""SmolLM2-135M's layers, in and out."""


OURS = {"bfloat16": amx.product, "float32": amx_float32.product}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=OURS, default="bfloat16")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if not amx.available():
        raise SystemExit("no AMX here, or no compiler")
    for name, (width, outs) in SHAPES.items():
        rows = 256 if outs > 10_000 else arguments.rows
        x, w, dy = (
            torch.randn(shape).to(getattr(torch, arguments.dtype))
            for shape in ((rows, width), (outs, width), (rows, outs))
        )
        for what, a, b in (("y = x W^T", x, w.t()), ("dx = dy W", dy, w), ("dW = dy^T x", dy.t(), x)):
            print(f"{name}, {what}: {compared(a, b, arguments.rounds)}", flush=True)


def compared(a: torch.Tensor, b: torch.Tensor, rounds: int) -> str:
    made, flops = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype), 2.0 * a.numel() * b.shape[1]
    run = immediate(torch.device("cpu"))
    found_by_us = torch.empty_like(made)
    OURS[str(a.dtype).removeprefix("torch.")](run, a, b, found_by_us)

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
    errors = ""
    if a.dtype == torch.float32 and flops < 2**32:
        true = a.double() @ b.double()
        both = (float((x.double() - true).norm() / true.norm()) * 2**24 for x in (made, found_by_us))
        errors = ", error {:.1f}, {:.1f}".format(*both)
    rates = f"{flops / theirs / 1e9:.0f} GFLOP/s aten (first {first:+.1f} ms), {flops / ours / 1e9:.0f} ours"
    return f"{rates}, {ratio:.2f} x{errors}"


if __name__ == "__main__":
    main()
