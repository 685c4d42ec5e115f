"""Products with a narrow side, an adapter's rank: compiled kernels (native/src/narrow_rows.c) or aten.

Beside bfloat16 aten wants float32 copies of what is wide and of what is added to; the kernels widen as they read and
round as they write. Either way sums are float32, and what is added to is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from smedjan.backends.cpu_native import native
from smedjan.backends.cpu_native.native.team import Step, call, step
from smedjan.backends.cpu_native.products import aten, scaled
from smedjan.backends.cpu_native.table import DTYPES
from smedjan.backends.planned.launch import Launches
from smedjan.graph.tensor import Tensor as Described

MOST = {"float32": 64, "bfloat16": 128}
"""By dtype of x, the most ranks of a group in all that the kernels are given: with more of them MKL is faster, copies
and all (bench/narrow.py). src/narrow_rows.c packs 256."""

Product = tuple[Tensor, Tensor, Tensor, float]


class Narrow(Protocol):
    """Each method is given products of which none reads what another one writes; all but `wide` are float32.

    wide    rows of x or dy as the other methods take them
    reduce  (x, p, low, f):  low = f x p           x wide [M, K], p [K, R] -> low [M, R]
    expand  (low, p, y, f):  y = y + f low p       low [M, R], p [R, N] -> y [M, N] of either dtype
    outer   (g, x, out, f):  out = f g^T x         g [M, R], x wide [M, K] -> out [R, K] or the transposed of one
    """

    @staticmethod
    def wide(run: Launches, x: Tensor) -> Tensor: ...
    @staticmethod
    def reduce(run: Launches, products: Sequence[Product]) -> None: ...
    @staticmethod
    def expand(run: Launches, products: Sequence[Product]) -> None: ...
    @staticmethod
    def outer(run: Launches, products: Sequence[Product]) -> None: ...


class Native:
    """Products of one method are one call."""

    label = "native narrow"

    @staticmethod
    def fits(x: Described | None, low: Described | None) -> bool:
        """low has the ranks of a group's members side by side."""
        assert x is not None
        assert low is not None
        return low.shape[-1] <= MOST.get(x.dtype, 0) and native.available()

    @staticmethod
    def wide(run: Launches, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def reduce(run: Launches, products: Sequence[Product]) -> None:
        _call(run, "reduce", products, _reduce)

    @staticmethod
    def expand(run: Launches, products: Sequence[Product]) -> None:
        _call(run, "expand", products, _expand)

    @staticmethod
    def outer(run: Launches, products: Sequence[Product]) -> None:
        _call(run, "outer", products, _outer)


def _call(run: Launches, name: str, products: Sequence[Product], write: Callable[..., Step]) -> None:
    if products:
        call(run, f"narrow {name}", *(write(*each) for each in products))


def _reduce(x: Tensor, p: Tensor, low: Tensor, factor: float) -> Step:
    sizes = (*x.shape, p.shape[1], x.stride(0), *p.stride(), low.stride(0))
    return step(f"narrow_reduce_{DTYPES[x.dtype]}", (x, p, low), sizes, (factor,))


def _expand(low: Tensor, p: Tensor, y: Tensor, factor: float) -> Step:
    sizes = (*low.shape, p.shape[1], low.stride(0), *p.stride(), y.stride(0))
    return step(f"narrow_expand_{DTYPES[y.dtype]}", (low, p, y), sizes, (factor,))


def _outer(g: Tensor, x: Tensor, out: Tensor, factor: float) -> Step:
    sizes = (*g.shape, x.shape[1], g.stride(0), x.stride(0), *out.stride())
    return step(f"narrow_outer_{DTYPES[x.dtype]}", (g, x, out), sizes, (factor,))


class Aten:
    label = "addmm"

    @staticmethod
    def wide(run: Launches, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return x
        made = run.scratch(tuple(x.shape), torch.float32)
        run.library("aten copy", Tensor.copy_, made, x)
        return made

    @staticmethod
    def reduce(run: Launches, products: Sequence[Product]) -> None:
        for x, p, low, factor in products:
            _product(run, x, p, low, factor)

    @staticmethod
    def expand(run: Launches, products: Sequence[Product]) -> None:
        for low, p, y, factor in products:
            made = Aten.wide(run, y)
            scaled(run, low, p, made, factor, add=True)
            if made is not y:
                run.library("aten copy", Tensor.copy_, y, made)

    @staticmethod
    def outer(run: Launches, products: Sequence[Product]) -> None:
        for g, x, out, factor in products:
            if out.is_contiguous():
                _product(run, g.t(), x, out, factor)
            else:
                _product(run, x.t(), g, out.t(), factor)


def _product(run: Launches, a: Tensor, b: Tensor, out: Tensor, factor: float) -> None:
    if factor == 1.0:
        aten(run, a, b, out)
    else:
        scaled(run, a, b, out, factor, add=False)
