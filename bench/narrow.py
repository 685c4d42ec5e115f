"""An adapter's narrow products on the CPU beside aten's, which takes float32 copies of what is bfloat16.

    OMP_NUM_THREADS=2 python bench/narrow.py [--ranks 16,48] [--rows 1024] [--rounds 30]

Both take turns; each figure is the median of the rounds, the ratio that of the rounds' ratios (above 1: compiled is
faster). Arrays take turns too, so that none is in the first caches because it was the last one's: in a step it is not.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch import Tensor

from smedjan.backends.cpu_native.narrow import Aten, Narrow, Native, Product
from smedjan.backends.planned.immediate import immediate

WIDTHS = (576, 1536)
"""SmolLM2-135M's: of most layers, and of the MLP."""

COPIES = 4


def calls(side: type[Narrow], method: str, product: Product) -> list:
    run = immediate(torch.device("cpu"))
    first, second, result, factor = product
    if method == "reduce":
        first = side.wide(run, first)
    if method == "outer":
        second = side.wide(run, second)
    getattr(side, method)(run, [(first, second, result, factor)])
    return run.calls


def products(rows: int, width: int, ranks: int, dtype: torch.dtype) -> dict[str, tuple[str, Product]]:
    x, y, low = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype), torch.randn(rows, ranks)
    a, b = torch.randn(ranks, width), torch.randn(width, ranks)
    return {
        "low = x A^T": ("reduce", (x, a.t(), torch.empty_like(low), 1.0)),
        "g = s dy B": ("reduce", (x, b, torch.empty_like(low), 0.5)),
        "y += s low B^T": ("expand", (low, b.t(), y, 1e-3)),
        "dx += g A": ("expand", (low, a, y, 1e-3)),
        "dA = g^T x": ("outer", (low, x, torch.empty_like(a), 1.0)),
        "dB = s dy^T low": ("outer", (low, x, torch.empty_like(b).t(), 0.5)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="16,48")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    for ranks in map(int, arguments.ranks.split(",")):
        for width in WIDTHS:
            for dtype in (torch.float32, torch.bfloat16):
                copies = [products(arguments.rows, width, ranks, dtype) for _ in range(COPIES)]
                for name in copies[0]:
                    measure(name, [each[name] for each in copies], arguments.rounds, str(dtype).removeprefix("torch."))


def measure(name: str, copies: list[tuple[str, Product]], rounds: int, dtype: str) -> None:
    sides = {side.label: [calls(side, *each) for each in copies] for side in (Native, Aten)}
    found: dict[str, list[float]] = {label: [] for label in sides}
    for turn in range(rounds + 1):
        for label, ways in sides.items():
            began = time.perf_counter()
            for call in ways[turn % COPIES]:
                call()
            found[label].append(time.perf_counter() - began)
    ours, theirs = (times[1:] for times in found.values())
    first, second, result, _ = copies[0][1]
    shapes: tuple[Tensor, ...] = (first, second, result)
    flops = 2 * first.numel() * second.numel() / (first.shape[1] if copies[0][0] != "outer" else first.shape[0])
    sizes = ", ".join(f"{list(each.shape)}" for each in shapes)
    print(
        f"{name:16} {dtype:9} {sizes}, {torch.get_num_threads()} threads: "
        f"{Native.label} {1e3 * median(ours):.3f} ms, {flops / median(ours) / 1e9:.0f} GFLOP/s; "
        f"aten {1e3 * median(theirs):.3f} ms; {median(b / a for a, b in zip(ours, theirs, strict=True)):.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
