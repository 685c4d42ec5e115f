"""What a machine's matrix products reach, measured: the peak that a step's model FLOPs are compared with."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.raw import RawTensor
from smedjan.graph.node import Graph
from smedjan.ops.linear import linear

if TYPE_CHECKING:
    from smedjan.backends.base import Backend

SMALLEST, LARGEST = 256, {"cpu": 1024}
"""Rows of the products. 1024 keep the arrays of a CPU small beside any model's, so that the peak of memory stays the
run's own; other devices need `ELSEWHERE` to be filled."""

ELSEWHERE = 8192

ENOUGH_S = 0.1
"""After which no larger product is begun: a machine that is busy, or slow."""


def matmul_flops(backend: Backend, dtype: str) -> float:
    """FLOP/s of the fastest x W^T of a few sizes, x and W [n, n] of a unit normal: 2 n^3 over the best of three runs.

    n doubles up to the largest: some tens of milliseconds in all.
    """
    best, size, start = 0.0, SMALLEST, time.perf_counter()
    while True:
        graph = Graph()
        graph.output("y", linear(graph.input("x", (size, size), dtype), graph.input("w", (size, size), dtype)))
        program = backend.program(graph)
        drawn = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
        inputs = {name: backend.from_raw(convert(RawTensor.of(drawn), dtype)) for name in "xw"}
        backend.synchronize(program(inputs))
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            backend.synchronize(program(inputs))
            seconds.append(time.perf_counter() - began)
        best = max(best, 2 * size**3 / max(min(seconds), 1e-9))
        if time.perf_counter() - start > ENOUGH_S or size >= LARGEST.get(backend.device, ELSEWHERE):
            return best
        size *= 2
