"""Arrays as the kernels read them: rows of heads that were moved to the front."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.layout import collapse


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Arrays of one shape [..., D], whose row (batch * heads + head) * tokens + token lies at three strides of each.

    What follows each other in all of them is merged: rows at one stride are batches of one head of one token.
    """

    count: int
    heads: int
    tokens: int
    strides: tuple[int, ...]
    """Three of each array, in order: (batch, head, token) of the first, of the second, ..."""


def rows_of(*arrays: Tensor | None) -> Rows:
    """An array that is None has strides 0."""
    given = [array for array in arrays if array is not None]
    shape = given[0].shape
    for array in given:
        assert array.shape == shape, f"{list(array.shape)} beside {list(shape)}"
        assert array.stride(-1) == 1 or shape[-1] <= 1, f"rows are not contiguous: {list(shape)}, {array.stride()}"
    in_order = torch.empty(shape[:-1], device="meta").stride()
    dims = collapse(shape[:-1], [in_order, *(array.stride()[:-1] for array in given)])
    assert len(dims) <= 3, f"rows of {list(shape)} at more than three strides: {dims}"
    (_, batch), (heads, head), (tokens, token) = dims + [(1, (0,) * (len(given) + 1))] * (3 - len(dims))
    steps = iter(zip(batch[1:], head[1:], token[1:], strict=True))
    strides = [step for array in arrays for step in ((0, 0, 0) if array is None else next(steps))]
    return Rows(count=prod(shape[:-1]), heads=heads, tokens=tokens, strides=tuple(strides))
