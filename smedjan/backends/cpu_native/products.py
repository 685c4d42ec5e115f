"""Who makes a rule's matrix products: our kernels on AMX, of bfloat16 (`amx.py`) or of float32 in three terms
(`amx_float32.py`), or aten, which is MKL and oneDNN. A rule is registered once for each, so that plans say who does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from smedjan.backends.cpu_native import amx, amx_float32
from smedjan.backends.planned.launch import Launches
from smedjan.graph.tensor import Tensor as Described

MM, ADDMM = "aten mm", "aten addmm"


class Product(Protocol):
    """out = a b (+ plus: a row for all, or an array of out's shape)       a [M, K], b [K, N] -> out [M, N]"""

    def __call__(self, run: Launches, a: Tensor, b: Tensor, out: Tensor, *, plus: Tensor | None = None) -> None: ...


def aten(run: Launches, a: Tensor, b: Tensor, out: Tensor, *, plus: Tensor | None = None) -> None:
    if plus is None:
        run.library(MM, torch.mm, a, b, out=out)
    else:
        run.library(ADDMM, torch.addmm, plus, a, b, out=out)


def scaled(run: Launches, a: Tensor, b: Tensor, out: Tensor, factor: float, *, add: bool) -> None:
    """out = factor a b, or out += factor a b, by aten"""
    run.library(ADDMM, torch.addmm, out, a, b, beta=1 if add else 0, alpha=factor, out=out)


Sizes = Iterable[tuple[int, int, int]]
"""Rows, columns and depth of products, in any order."""


@dataclass(frozen=True, kw_only=True)
class Maker:
    """`takes(dtypes of operands and results, sizes)`; `label` takes the place of "aten mm" in a plan."""

    label: str
    product: Product
    takes: Callable[[set[str], Sizes], bool]


ATEN = Maker(label=MM, product=aten, takes=lambda dtypes, sizes: True)
BFLOAT16 = Maker(
    label=amx.LABEL, product=amx.product, takes=lambda dtypes, sizes: dtypes == {"bfloat16"} and amx.available()
)
FLOAT32 = Maker(
    label=amx_float32.LABEL,
    product=amx_float32.product,
    takes=lambda dtypes, sizes: (
        dtypes == {"float32"}
        and all(amx_float32.large(*each) for each in sizes)
        and amx_float32.wanted()
        and amx.available()
    ),
)
MAKERS = (ATEN, BFLOAT16, FLOAT32)
"""The last one that takes a node's products makes them."""


def floats(tensors: Iterable[Described | None]) -> set[str]:
    return {t.dtype for t in tensors if t is not None and t.dtype not in ("int64", "bool")}


def of_weights(x: Described | None, weights: Iterable[Described | None], *, together: bool) -> Sizes:
    """Sizes of the products of the rows of x with these weights [N, K], each or stacked."""
    assert x is not None
    rows, shapes = x.numel // max(1, x.shape[-1]), [t.shape for t in weights if t is not None]
    if together:
        shapes = [(sum(shape[0] for shape in shapes), shapes[0][1])]
    return [(rows, *shape) for shape in shapes]  # type: ignore[misc]
