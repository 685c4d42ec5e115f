"""Arrays as rows, one stride apart."""

from __future__ import annotations

from math import prod

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as a view [rows, D] with contiguous rows, one stride apart. Anything else is a defect of the plan."""
    assert x.stride(-1) == 1 or x.shape[-1] <= 1, (
        f"rows are not contiguous: shape {list(x.shape)}, strides {x.stride()}"
    )
    # view() cannot infer the row count of an empty tensor.
    return x.view(prod(x.shape[:-1]), x.shape[-1])
