"""Arrays as rows, one stride apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as a view [rows, D] with contiguous rows, one stride apart. Anything else is a defect of the plan."""
    assert x.stride(-1) == 1 or x.shape[-1] <= 1, (
        f"rows are not contiguous: shape {list(x.shape)}, strides {x.stride()}"
    )
    # view() cannot infer the row count of an empty tensor.
    return x.view(prod(x.shape[:-1]), x.shape[-1])


def row_blocks(arrays: Sequence[Tensor | None], per_row: Sequence[Tensor | None] = ()) -> Iterator[list[Tensor | None]]:
    """Arrays [..., D] of one shape, and others [...] of a number a row, in blocks: [rows, D] and [rows] views, of which
    each has one stride from row to row. Of most arrays there is one block; heads that were moved to the front have one
    for each head of a batch. None stays None."""
    given = [array for array in arrays if array is not None]
    shape = given[0].shape[:-1]
    strides = [array.stride()[:-1] for array in given] + [array.stride() for array in per_row if array is not None]
    dims = _merged(shape, strides)
    inner = max(range(len(dims)), key=lambda index: dims[index][0]) if dims else None
    count, step = (1, (1,) * len(strides)) if inner is None else dims[inner]
    outer = [dim for index, dim in enumerate(dims) if index != inner]
    for place in product(*(range(size) for size, _ in outer)):
        starts = [sum(at * steps[i] for at, (_, steps) in zip(place, outer, strict=True)) for i in range(len(strides))]
        found = iter(zip(starts, step, strict=True))
        block: list[Tensor | None] = []
        for array in arrays:
            if array is not None:
                start, stride = next(found)
                width = array.shape[-1]
                assert array.stride(-1) == 1 or width <= 1, f"rows are not contiguous: {array.stride()}"
                array = array.as_strided((count, width), (stride, 1), array.storage_offset() + start)
            block.append(array)
        for array in per_row:
            if array is not None:
                start, stride = next(found)
                array = array.as_strided((count,), (stride,), array.storage_offset() + start)
            block.append(array)
        yield block


def _merged(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, ...]]]:
    """(size, each array's stride) of the dims, those that all arrays walk as one merged."""
    dims: list[tuple[int, tuple[int, ...]]] = []
    for index, size in enumerate(shape):
        steps = tuple(each[index] for each in strides)
        if size == 1:
            continue
        if dims and all(wide == step * size for wide, step in zip(dims[-1][1], steps, strict=True)):
            dims[-1] = (dims[-1][0] * size, steps)
        else:
            dims.append((size, steps))
    return dims
