"""Products of 8-bit integers on the CPU beside MKL's float32 ones and torch._int_mm, which gives unscaled sums.

    OMP_NUM_THREADS=1 python bench/w8a8.py [--rows 1024] [--rounds 30]

All three take turns; each figure is the median of the rounds, in milliseconds. cpu_native's has all that a layer needs
in a training step: coding x, laying the codes of W in panels, the product, scaling.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from smedjan.backends.cpu_native import PLANNED
from smedjan.backends.planned.immediate import node_of, written

SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""SmolLM2-135M's layers, in and out: q, k and v; o; gate and up; down."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    for width, outs in SHAPES:
        x, weight = (torch.randn(rows, width, generator=generator) for rows in (arguments.rows, outs))
        codes, scale = PLANNED.lower(node_of("int8_quantize", (weight,), {})).run(weight)
        given = (x, weight, codes, scale)
        rule = PLANNED.lower(node_of("w8a8_linear", given, {}))
        calls, _ = written("w8a8_linear", rule.bind, rule.donates, False, *given)
        narrow, y = x.to(torch.int8), torch.empty(arguments.rows, outs)
        sums = torch.empty(arguments.rows, outs, dtype=torch.int32)

        def ours(calls=calls):
            for call in calls:
                call()

        sides = {
            "float32 mm": lambda x=x, weight=weight, y=y: torch.mm(x, weight.t(), out=y),
            "torch._int_mm": lambda x=narrow, codes=codes, sums=sums: torch._int_mm(x, codes.t(), out=sums),
            rule.label: ours,
        }
        found: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds + 1):
            for name, side in sides.items():
                began = time.perf_counter()
                side()
                found[name].append(1e3 * (time.perf_counter() - began))
        row = ", ".join(f"{name} {median(times[1:]):.2f} ms" for name, times in found.items())
        print(f"[{arguments.rows} x {width}] [{width} x {outs}], {torch.get_num_threads()} threads: {row}", flush=True)


if __name__ == "__main__":
    main()
