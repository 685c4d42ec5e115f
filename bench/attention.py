"""Attention of a training step on the CPU: cpu_native's compiled kernels beside aten's flash attention.

    OMP_NUM_THREADS=2 python bench/attention.py [--rounds 20] [--layers 30]

Both take turns over arrays as a plan has them (heads inside), aten with the copies of its results to their places. Each
figure is the median of the rounds, in milliseconds for all layers. The roofline is the rate of a large float32 product
of torch's (MKL) on the same threads; of a causal mask, half of the arithmetic counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cpu_native import attention
from smedjan.backends.planned.immediate import immediate

SHAPES = ((8, 9, 3, 128, 64), (2, 9, 3, 512, 64), (1, 9, 3, 1024, 64), (1, 9, 3, 2048, 64), (1, 8, 2, 1024, 128))
"""Rows, query heads, key heads, tokens, head dim: SmolLM2-135M's at several lengths, and one with wider heads."""

SIDES = {
    attention.LABEL: (attention.planned_attention, attention.planned_attention_bwd),
    attention.NATIVE: (attention.native_attention, attention.native_attention_bwd),
}


def heads_inside(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)


def calls(bind: Callable[..., None], ins: tuple, outs: tuple, **attrs: Any) -> Callable[[], None]:
    run = immediate(torch.device("cpu"))
    bind(run, ins, outs, **attrs)

    def play() -> None:
        for call in run.calls:
            call()

    return play


def times(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, by turns; the first round is warming up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            found[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(each[1:]) for name, each in found.items()}


def roofline() -> float:
    """GFLOP/s"""
    a, out = torch.randn(1024, 1024), torch.empty(1024, 1024)
    return 2 * 1024**3 / times({"mm": lambda: torch.mm(a, a, out=out)}, 20)["mm"] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()
    rate, layers = roofline(), arguments.layers
    print(f"{torch.get_num_threads()} threads, a float32 product runs at {rate:.0f} GFLOP/s", flush=True)
    for batch, heads, groups, tokens, dim in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            shapes = [(batch, each, tokens, dim, dtype) for each in (heads, groups, groups)]
            q, k, v = (heads_inside(*shape) for shape in shapes)
            dy, y = heads_inside(*shapes[0]), heads_inside(*shapes[0])
            lse, gradients = torch.empty(batch, heads, tokens), tuple(heads_inside(*shape) for shape in shapes)
            attrs = {"causal": True, "scale": dim**-0.5, "cap": 0.0}
            forward = {name: calls(binds[0], (q, k, v, None), (y, lse), **attrs) for name, binds in SIDES.items()}
            backward = {
                name: calls(binds[1], (dy, q, k, v, None, y, lse), gradients, **attrs) for name, binds in SIDES.items()
            }
            for kind, sides, products in (("forward", forward, 2), ("backward", backward, 5)):
                found = times(sides, arguments.rounds)
                aten, ours = found[attention.LABEL], found[attention.NATIVE]
                flops = products * batch * heads * tokens * tokens * dim
                print(
                    f"{[batch, heads, groups, tokens, dim]} {str(dtype)[6:]} {kind}: "
                    f"aten {layers * aten:.1f} ms, native {layers * ours:.1f} ms, ratio {ours / aten:.2f}, "
                    f"{flops / ours / 1e6:.0f} GFLOP/s, {flops / ours / 1e6 / rate:.2f} of the roofline",
                    flush=True,
                )


if __name__ == "__main__":
    main()
