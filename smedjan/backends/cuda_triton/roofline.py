"""A static roofline: what each kernel loads and stores against what its op must, and the time that this takes at least.

Three figures for an example, each over the op's minimum (every input read once, every output written once):

    moved      each launch reads and writes each array at most once: what goes through device memory when whatever is
               read again within a launch still lies in the caches
    requested  all that the launches' threads load and store, what caches give them included
    code       the same from the machine code: width of each access x threads x programs. Where a kernel has neither
               loops nor branches this is exact, and equal to `requested` but for masked tails: the compiler adds
               nothing to what the source asks for

The interpreter counts: it runs a sample of a launch's programs on arrays as large as the example says, full of zeros or
of the example's `fill` (pages that nobody touches take no memory), and notes the places that each `tl.load` and
`tl.store` touches.

The time is a bound, not a measurement: max(minimum / bandwidth, FLOPs / peak) of an H100 SXM.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from smedjan.backends.cuda_triton.examples import Example, all_examples
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.record import record
from smedjan.backends.planned.launch import Launch
from smedjan.errors import BackendError
from smedjan.graph.node import Node

CAPABILITY = 90

BANDWIDTH = 3.35e12
TENSOR_CORE_FLOPS = 989.4e12
"""bfloat16 and float16, dense."""
FLOPS = 66.9e12
"""float32.

NVIDIA H100 Tensor Core GPU data sheet, SXM5: 3.35 TB/s; 989.4 TFLOPS bfloat16 without sparsity; 66.9 TFLOPS float32.
"""

EXPLAIN = 1.1
"""A ratio above this is explained (`EXPLAINED` in the example's file)."""

MOST_PROGRAMS, MOST_ACCESSES = 32, 512
"""A sample's size: at most these programs, fewer where each has many accesses."""

STEPS = {1: (0.6180339887,), 2: (0.7548776662, 0.5698402910), 3: (0.8191725134, 0.6710436067, 0.5497004779)}
"""By dimensions: multiples of these, modulo 1, fill the unit cube evenly and follow no period of a grid (the powers of
1 / g, g^(d + 1) = g + 1: Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences", 2018)."""


@dataclass
class Traffic:
    """Bytes of one launch by array: [reads, writes] that threads ask for, and the array's own size."""

    name: str
    programs: int
    requested: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def reads(self) -> float:
        return sum(read for read, _ in self.requested.values())

    @property
    def writes(self) -> float:
        return sum(written for _, written in self.requested.values())

    @property
    def moved(self) -> float:
        """An array is read once at most, and written once."""
        return sum(min(bytes_, self.sizes[name]) for name, both in self.requested.items() for bytes_ in both)


@dataclass(frozen=True, kw_only=True)
class Count:
    """An example's traffic, launch by launch, its op's minimum of bytes, its FLOPs and the time bound in seconds."""

    op: str
    name: str
    launches: tuple[Traffic, ...]
    minimum: int
    flops: int
    bound: float

    @property
    def requested(self) -> float:
        return sum(launch.reads + launch.writes for launch in self.launches) / self.minimum

    @property
    def moved(self) -> float:
        return sum(launch.moved for launch in self.launches) / self.minimum


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of memory that is there once it is touched."""
    size = prod(shape) * torch.empty((), dtype=dtype).itemsize
    return torch.from_numpy(np.zeros(max(size, 1), dtype=np.uint8))[:size].view(dtype).view(shape)


def count(example: Example) -> Count:
    """Run a sample of each launch's programs in the interpreter."""
    if not common.INTERPRETED.value:
        raise BackendError(
            "accesses are counted where Triton interprets its kernels", field="TRITON_INTERPRET", remedy="set it to 1"
        )
    recorded = record(example, capability=CAPABILITY, make=zeros)
    cost = recorded.node.op.cost(recorded.node)
    return Count(
        op=example.op,
        name=example.name,
        launches=_traffics(recorded.launches),
        minimum=cost.bytes,
        flops=cost.flops,
        bound=max(cost.bytes / BANDWIDTH, cost.flops / _peak(recorded.node)),
    )


def _traffics(launches: Sequence[Launch]) -> tuple[Traffic, ...]:
    """A head's chunks are launches of one kernel over arrays of one layout: such are counted once."""
    counted: dict[Any, Traffic] = {}
    for launch in launches:
        if _likeness(launch) not in counted:
            counted[_likeness(launch)] = traffic(launch)
    return tuple(counted[_likeness(launch)] for launch in launches)


def _likeness(launch: Launch) -> tuple[Any, ...]:
    def of(value: Any) -> Any:
        return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else repr(value)

    values = (*launch.args, *(value for _, value in sorted(launch.constants.items())))
    return (launch.name, launch.grid, *map(of, values))


def _peak(node: Node) -> float:
    """Tensor cores where a 16-bit array is among the inputs: float32 is multiplied in float32. FP8 is twice as fast."""
    if node.op.name.startswith("fp8"):
        return 2 * TENSOR_CORE_FLOPS
    narrow = any(t is not None and t.dtype in ("bfloat16", "float16") for t in node.inputs)
    return TENSOR_CORE_FLOPS if narrow else FLOPS


def traffic(launch: Launch) -> Traffic:
    """A kernel's accesses, from a sample of its programs; a library's call reads or writes each array once."""
    if not launch.grid:
        arrays = [value for value in (*launch.args, *launch.constants.values()) if isinstance(value, Tensor)]
        found = Traffic(launch.name, 1)
        for number, array in enumerate(arrays):
            found.requested[str(number)] = [float(array.nbytes), 0.0]
            found.sizes[str(number)] = array.nbytes
        return found
    grid = (*launch.grid, 1, 1)[:3]
    found = Traffic(launch.name, prod(grid))
    bound = dict(zip(launch.function.arg_names, launch.args, strict=False)) | dict(launch.constants)
    homes = _homes(bound, found)
    first = _sample(grid, 1)
    accesses = _run(launch, grid, first, lambda *access: None)
    chosen = _sample(grid, max(min(MOST_PROGRAMS, MOST_ACCESSES // max(accesses, 1)), 4))

    def note(address: int, bytes_: int, written: bool) -> None:
        name = next(name for name, (start, end) in homes.items() if start <= address < end)
        found.requested[name][written] += bytes_ * found.programs / len(chosen)

    _run(launch, grid, chosen, note)
    return found


def _homes(bound: dict[str, Any], found: Traffic) -> dict[str, tuple[int, int]]:
    """Where each argument's memory begins and ends; arguments within one buffer are one, under all their names."""
    homes: dict[str, tuple[int, int]] = {}
    by_storage: dict[int, dict[tuple[Any, ...], tuple[str, Tensor]]] = {}
    for name, value in bound.items():
        if isinstance(value, Tensor) and value.numel():
            views = by_storage.setdefault(value.untyped_storage().data_ptr(), {})
            views.setdefault((value.data_ptr(), value.shape, value.stride()), (name, value))
    for start, views in by_storage.items():
        names = ", ".join(name for name, _ in views.values())
        tensors = [tensor for _, tensor in views.values()]
        homes[names] = (start, start + tensors[0].untyped_storage().nbytes())
        found.requested[names] = [0.0, 0.0]
        found.sizes[names] = min(sum(tensor.nbytes for tensor in tensors), tensors[0].untyped_storage().nbytes())
    return homes


def _sample(grid: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """About `count` of the grid's programs, all of them where there are no more, evenly along each axis: what programs
    do grows along causal attention's, and has the period of a row's blocks along elementwise kernels'."""
    if prod(grid) <= count:
        return list(product(*(range(size) for size in grid)))
    steps = iter(STEPS[sum(size > 1 for size in grid)])
    axes = [next(steps) if size > 1 else 0.0 for size in grid]
    points = ([int((i + 0.5) * step % 1.0 * size) for step, size in zip(axes, grid, strict=True)] for i in range(count))
    return sorted({tuple(point) for point in points})


class _OnHost(interpreter.GridExecutor):
    """Arrays lie on the host: nothing is copied there and back."""

    def _init_args_hst(self, args_dev: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return list(args_dev), kwargs

    def _restore_args_dev(self, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        pass


Note = Callable[[int, int, bool], None]
"""(address, bytes, written)"""


def _run(launch: Launch, grid: tuple[int, ...], programs: list[tuple[int, ...]], note: Note) -> int:
    """Runs these programs of the grid and tells `note` of each access; how many accesses there were."""
    kernel = launch.function
    with _observed(grid, programs, note) as accesses, np.errstate(all="ignore"):
        _OnHost(kernel.rewrite(), kernel.arg_names, (len(programs),))(*launch.args, **launch.constants)
    return len(accesses)


@contextmanager
def _observed(grid: tuple[int, ...], programs: list[tuple[int, ...]], note: Note) -> Iterator[list[int]]:
    """The interpreter's builder with its loads and stores seen, and its n-th program the n-th of `programs`."""
    builder = interpreter.interpreter_builder
    kind = type(builder)
    accesses: list[int] = []

    def see(pointers: Any, mask: Any, written: bool) -> None:
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        if lanes.any():
            # Lanes of one access that want one value get it together.
            places = np.unique(pointers.data[lanes])
            note(int(places[0]), places.size * pointers.get_element_ty().primitive_bitwidth // 8, written)
        accesses.append(1)

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        see(pointers, mask, False)
        return kind.create_masked_load(builder, pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        see(pointers, mask, True)
        return kind.create_masked_store(builder, pointers, value, mask, *rest)

    def atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        see(pointers, mask, False)
        see(pointers, mask, True)
        return kind.create_atomic_rmw(builder, operation, pointers, value, mask, *rest)

    replaced = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic,
        "set_grid_dim": lambda *_: kind.set_grid_dim(builder, *grid),
        "set_grid_idx": lambda x, y, z: kind.set_grid_idx(builder, *programs[x]),
    }
    try:
        for name, method in replaced.items():
            setattr(builder, name, method)
        yield accesses
    finally:
        for name in replaced:
            delattr(builder, name)


HEADER = """# Bytes and bounds of the Triton kernels

No figure here is a time that anyone measured: bytes are counted, times are bounds. Of each example (shapes of
SmolLM2-135M, Qwen3-0.6B, Llama-3-8B): the bytes that its op must move (every input read once, every output written
once); over them, what its launches move through device memory when each array is read and written at most once a
launch (`moved`), what their threads ask for, caches included (`requested`), and the same by the machine code for sm_90
where a kernel has neither loops nor branches (`code`); FLOPs by the op's rule; and the least time on an H100 SXM,
max(bytes / 3.35 TB/s, FLOPs / peak), peak 989.4 TFLOP/s for 16-bit inputs, twice that in FP8, 66.9 in float32 (NVIDIA's
data sheet, dense).

`moved` below 1: an op reads only some of an input (an embedding's rows), or a kernel leaves out what was not needed.
What lies above 1.1 is explained. How it is counted: `smedjan/backends/cuda_triton/roofline.py`. Made by
`python -m smedjan.backends.cuda_triton.aot --roofline --write bench/kernels.md`.

| op | example | launches | MB | moved | requested | code | FLOP/byte | bound, not measured | why more |
|---|---|---|---|---|---|---|---|---|---|
"""

CODE_COLUMN = 6


def row(found: Count, why: str, code: float | None = None) -> str:
    """A line of the table; `code` is the machine code's bytes over the minimum."""
    launches = ", ".join(launch.name for launch in found.launches)
    return " | ".join(
        (
            f"| {found.op}",
            found.name,
            launches,
            f"{found.minimum / 1e6:,.1f}",
            f"{found.moved:.2f}",
            f"{found.requested:.2f}",
            "" if code is None else f"{code:.2f}",
            f"{found.flops / found.minimum:,.1f}",
            f"{found.bound * 1e6:,.1f} us",
            f"{why if needs_why(found) else ''} |",
        )
    )


def needs_why(found: Count) -> bool:
    """Rounded as the table prints it."""
    return round(max(found.moved, found.requested), 2) > EXPLAIN


def load(text: str) -> list[Count]:
    """What `main` prints."""
    return [
        Count(**{**one, "launches": tuple(Traffic(**launch) for launch in one["launches"])}) for one in json.loads(text)
    ]


def main() -> None:
    """The counts of every example as JSON: for `aot`, whose process compiles and cannot interpret."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        print(json.dumps([asdict(one) for one in pool.map(count, all_examples())]))


if __name__ == "__main__":
    main()
