"""What an example of an op is: its inputs' shapes and dtypes, without memory, and its attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.torch_reference.elementwise import DTYPES


def array(*shape: int, dtype: str = "bfloat16", order: tuple[int, ...] | None = None) -> Tensor:
    """A meta array; `order` has its dims as memory has them, outermost first."""
    if order is None:
        return torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    inner = torch.empty([shape[dim] for dim in order], dtype=DTYPES[dtype], device="meta")
    return inner.permute([order.index(dim) for dim in range(len(shape))])


@dataclass(frozen=True, kw_only=True)
class Example:
    """
    op      its name
    name    what is special about this one: dtype, shape, a model
    ins     meta arrays (views of wider ones too), None for an input that is not given, Python numbers for host scalars
    attrs   attributes
    unread  results that nobody reads
    fill    input -> the number that fills it where accesses are counted (`roofline`), or the numbers, over and over; 0
            where none is given
    """

    op: str
    name: str
    ins: tuple[Any, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[int, ...] = ()
    fill: Mapping[int, float | range] = field(default_factory=dict)
