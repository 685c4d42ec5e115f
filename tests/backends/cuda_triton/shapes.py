"""Shapes and memory layouts for tests of small ops, drawn from a seed, corners first; rules that write into views."""

from __future__ import annotations

import random
from math import prod
from typing import Any

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned.immediate import allocate, immediate, node_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CORNERS = [(1,), (1, 1), (7,), (64,), (1, 2049), (1025, 1), (3, 1024), (2, 1, 3), (1, 1, 1, 5), (2, 3, 5, 8), (5, 576)]
SIZES = [1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 33, 64, 96, 130, 257]


def shapes(seed: int, count: int = 44, *, least: int = 1, most: int = 3000) -> list[tuple[int, ...]]:
    """`count` shapes of one to four dims, `least` at least, the corners among them."""
    draw = random.Random(seed)
    found = [shape for shape in CORNERS if len(shape) >= least]
    while len(found) < count:
        shape = tuple(draw.choice(SIZES) for _ in range(draw.randint(least, 4)))
        if prod(shape) <= most and shape not in found:
            found.append(shape)
    return found


def numbered(cases: list[tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of pytest.mark.parametrize("number, shape"): a case's number picks its dtype and layout."""
    ids = [f"{'x'.join(map(str, shape))} {DTYPES[n % 3]} {LAYOUTS[n % 4]}" for n, shape in enumerate(cases)]
    return {"argvalues": list(enumerate(cases)), "ids": [one.replace("torch.", "") for one in ids]}


LAYOUTS = ["whole", "part", "moved", "apart"]


def laid_out(x: Tensor, how: str) -> Tensor:
    """x's values elsewhere: whole, as a `part` of rows three times as wide, with its dims `moved` about in memory, or
    with values that are two places `apart`."""
    if how == "part":
        wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
        place = wide[..., x.shape[-1] : 2 * x.shape[-1]]
    elif how == "moved":
        place = torch.empty(x.shape[::-1], dtype=x.dtype, device=x.device).permute(*range(x.ndim)[::-1])
    elif how == "apart":
        place = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype, device=x.device)[..., 0]
    else:
        return x
    return place.copy_(x)


def into(op_name: str, outs: tuple[Tensor | None, ...], *ins: Any, **attrs: Any) -> list[str]:
    """Runs the rule into the given results; names of what it launched."""
    node = node_of(op_name, ins, attrs)
    run = immediate(next(x.device for x in (*ins, *outs) if isinstance(x, Tensor)))
    RULES.lower(node).bind(run, ins, outs, **node.attrs)
    for call in run.calls:
        call()
    return [call.name for call in run.calls]


def result_of(op_name: str, *ins: Any, how: str, **attrs: Any) -> Tensor:
    """The rule's result, written into a place of that layout; what lies beside it is left alone."""
    (spec,) = node_of(op_name, ins, attrs).outputs
    y = allocate(spec.shape, getattr(torch, spec.dtype), ins[0].device)
    place = laid_out(y, how)
    into(op_name, (place,), *ins, **attrs)
    if how in ("part", "apart"):
        around = place._base
        assert around is not None
        assert int(around.isnan().sum()) == around.numel() - place.numel() + int(place.isnan().sum())
    return place
