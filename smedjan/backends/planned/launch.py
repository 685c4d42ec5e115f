"""Launches: what a lowering writes down instead of doing it, so that a step is a fixed list of bound calls.

A rule of a planned backend gets arrays that exist already, its results among them, and says which kernels and which
calls of a named library fill them. It allocates nothing and waits for nothing. Run at once (`immediate`), on buffers
(`program`), or on `meta` arrays, which have no memory, to see what would be started: the list is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.planned import memory

Scratch = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""(shape, dtype) -> a buffer for the node at hand alone."""

Host = Callable[[Callable[..., Sequence[float]], Sequence[Any]], Tensor]
"""(function, host scalars) -> a float32 buffer on the device that holds function(*scalars) when the list runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One start of a Triton kernel (`grid` is its grid) or one call of a library (`grid` is empty).

    name       the kernel's function ("rms_norm_fwd"), or the library and its call ("cublas mm")
    constants  a kernel's constexpr parameters and launch options, or a call's keyword arguments
    """

    name: str
    function: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any]

    def __call__(self) -> None:
        target = self.function[self.grid] if self.grid else self.function
        target(*self.args, **self.constants)


Value = Callable[[Any], Callable[[], Any]]
"""A host scalar -> a function that gives it when the list runs."""


class Launches:
    """Where rules write down their launches, in order.

    whole    the node's results are whole outputs of the graph, not places in the arena
    movable  tells the arrays that can be moved
    """

    def __init__(
        self,
        device: torch.device,
        *,
        scratch: Scratch,
        host: Host,
        allocate: memory.Allocate,
        value: Value = lambda scalar: lambda: scalar,
        whole: bool = True,
        movable: memory.Movable = memory.always,
    ) -> None:
        self.device = device
        self._whole, self._movable = whole, movable
        self.calls: list[Launch] = []
        self._scratch, self._host, self._value, self._allocate = scratch, host, value, allocate

    def kernel(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """`kernel[grid](*args, **constants)`. An empty grid starts nothing."""
        assert all(isinstance(size, int) and size >= 0 for size in grid), f"grid {grid}"
        if 0 not in grid:
            name = kernel.__name__
            self.calls.append(Launch(name=name, function=kernel, grid=grid, args=args, constants=constants))

    def library(self, name: str, function: Callable[..., Any], *args: Any, **keywords: Any) -> None:
        """`function(*args, **keywords)`, which writes into arrays that it is given. `name` begins with a library's."""
        self.calls.append(Launch(name=name, function=function, grid=(), args=args, constants=keywords))

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous buffer that holds until this node's launches have run; what is in it before is nobody's."""
        return self._scratch(shape, dtype)

    def host(self, function: Callable[..., Sequence[float]], *scalars: Any) -> Tensor:
        """function(*scalars) as a float32 vector on the device. Scalars (a learning rate, a step's number) are known to
        the host and change from run to run of one list: they are computed in float64 there and rounded once."""
        return self._host(function, scalars)

    def value(self, scalar: Any) -> Callable[[], Any]:
        """A host scalar as it is given to the run, for a call that is made on the host."""
        return self._value(scalar)

    def stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        """Whole parameters or gradients [O_i, ...] as one array [sum of O_i, ...] in memory: read or written as one."""
        return memory.stacked(tensors, self._allocate, self._movable)

    @contextmanager
    def stacked_results(self, outs: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
        """One array [sum of O_i, ...] to write the results [O_i, ...] into, which are of one dtype. Whole gradients are
        moved, once, to lie one behind another; what lies elsewhere, or is not all wanted, is copied there."""
        wanted = [out for out in outs if out is not None]
        if self._whole and len(wanted) == len(outs):
            yield self.stacked(wanted)
            return
        sizes = [shape[0] for shape in shapes]
        stack = self.scratch((sum(sizes), *shapes[0][1:]), wanted[0].dtype)
        yield stack
        for out, part in zip(outs, stack.split(sizes), strict=True):
            if out is not None:
                self.copy(part, out)

    def flat(self, *lists: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each list of whole parameters, gradients or moments as one flat bucket, all in one order."""
        return memory.flat(lists, self._allocate, self._movable)

    def zero(self, out: Tensor) -> None:
        """out = 0. A strided `out` is a kernel of aten's fill: give whole buffers."""
        assert out.is_contiguous(), f"a fill of strides {out.stride()}"
        self.library("memset", Tensor.zero_, out)

    def copy(self, source: Tensor, out: Tensor) -> None:
        """out = source, both contiguous and of one dtype."""
        assert source.is_contiguous(), f"a copy of strides {source.stride()}"
        assert out.is_contiguous(), f"a copy to strides {out.stride()}"
        assert source.dtype == out.dtype, f"a copy of {source.dtype} to {out.dtype}"
        self.library("memcpy", Tensor.copy_, out, source)
