"""mx.distributed over TCP, its ring backend: what `mlx.launch --backend ring` starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod

import mlx.core as mx

from smedjan.backends.collective import Collective, Lost, Specs
from smedjan.backends.mlx_metal.elementwise import DTYPES
from smedjan.errors import ConfigError, Elsewhere

BUCKET = 8 << 20
"""Values of one transfer: few of them, and little memory beside the gradients."""

LAUNCH = "start the processes by mlx.launch --backend ring"


class MlxCollective(Collective):
    """MLX's group of this process, made once from MLX_RANK and MLX_HOSTFILE: MLX ends it with the process."""

    def __init__(self, *, rank: int, world: int) -> None:
        if "MLX_HOSTFILE" not in os.environ:
            if rank > 0:
                raise Elsewhere("mlx_metal is started by mlx.launch")
            raise ConfigError(
                f"mlx_metal is given {world} processes that its library does not know",
                field="MLX_HOSTFILE",
                remedy=f"{LAUNCH}, not by torchrun or accelerate launch",
            )
        if not mx.distributed.is_available("ring"):
            raise ConfigError("this MLX has no ring", field="MLX_HOSTFILE", remedy="start one process")
        try:
            self._group = mx.distributed.init(strict=True, backend="ring")
        except RuntimeError as cause:
            raise ConfigError(
                f"the processes do not find one another: {cause}", field="MLX_HOSTFILE", remedy=LAUNCH
            ) from cause
        assert (self._group.rank(), self._group.size()) == (rank, world), "MLX counts other processes"
        self.rank, self.world = rank, world

    def gather(self, message: bytes) -> list[bytes]:
        lengths = memoryview(self._gathered(mx.array([len(message)], dtype=mx.int32))).tolist()  # type: ignore[arg-type]
        longest = max(lengths)
        ours = mx.array(memoryview(message.ljust(longest)))  # type: ignore[arg-type]
        content = bytes(memoryview(self._gathered(ours)))  # type: ignore[arg-type]
        return [content[rank * longest :][:length] for rank, length in enumerate(lengths)]

    def _gathered(self, array: mx.array) -> mx.array:
        with _lost():
            made = mx.distributed.all_gather(array, group=self._group)
            mx.eval(made)
        return made

    def sum(self, totals: Mapping[str, mx.array] | None, specs: Specs) -> Mapping[str, mx.array]:
        made = {}
        for names in buckets(specs, BUCKET):
            given = [mx.zeros(specs[name][0]) if totals is None else totals[name] for name in names]
            flat = mx.concatenate([array.reshape(-1).astype(mx.float32) for array in given])
            with _lost():
                summed = mx.distributed.all_sum(flat, group=self._group)
                mx.eval(summed)
            at = 0
            for name, array in zip(names, given, strict=True):
                shape, dtype = specs[name]
                made[name] = summed[at : at + array.size].reshape(shape).astype(DTYPES[dtype])
                at += array.size
        return made

    def add(
        self, totals: Mapping[str, mx.array] | None, grads: Mapping[str, mx.array] | None, specs: Specs, parts: int
    ) -> dict[str, mx.array]:
        raise AssertionError("an exact backend alone adds in the order of the micro-batches")

    def close(self) -> None:
        pass


def buckets(specs: Specs, most: int) -> Iterator[list[str]]:
    """Names in their order, together as long as they have no more than `most` values; a larger array is alone."""
    held: list[str] = []
    values = 0
    for name, (shape, _) in specs.items():
        numel = prod(shape)
        if held and values + numel > most:
            yield held
            held, values = [], 0
        held.append(name)
        values += numel
    if held:
        yield held


@contextmanager
def _lost() -> Iterator[None]:
    """What MLX raises when a process is gone, as one line."""
    try:
        yield
    except RuntimeError as cause:
        raise Lost(
            "another process of the run ended",
            remedy="see what it said, and go on from the last checkpoint with --resume",
        ) from cause
