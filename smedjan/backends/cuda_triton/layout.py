"""How elementwise kernels walk over strided arrays: as few dims as the strides allow, the innermost along a tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common

OUTER = 3
"""Dims besides the innermost that a kernel counts through: with it, as many as [B, H, T, D] has."""

Dims = list[tuple[int, tuple[int, ...]]]
"""(size, stride of each operand), outermost first."""


def collapse(sizes: Sequence[int], strides: Sequence[Sequence[int]], *, by: int = 0) -> Dims:
    """The dims as memory of operand `by` has them, outermost first; those that every operand walks as one are merged.

    `strides` holds each operand's. A dim of one place has no stride.
    """
    dims = [(size, tuple(each[i] for each in strides)) for i, size in enumerate(sizes) if size != 1]
    dims.sort(key=lambda dim: -dim[1][by])
    merged: Dims = []
    for size, steps in dims:
        if merged and all(wide == step * size for wide, step in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    return merged


def padded(dims: Dims) -> tuple[list[int], list[tuple[int, ...]]]:
    """The sizes of `OUTER` dims and each operand's strides; those that are missing in front: size 1, stride 0."""
    assert len(dims) <= OUTER, f"{len(dims)} dims do not merge into {OUTER}: {dims}"
    operands = len(dims[0][1]) if dims else 1
    whole = [(1, (0,) * operands)] * (OUTER - len(dims)) + dims
    return [size for size, _ in whole], [tuple(steps[i] for _, steps in whole) for i in range(operands)]


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One launch over every place of an output.

    outer    sizes of the outer dims, of which the last `dims` are more than padding
    strides  each operand's, along the outer dims and the innermost
    width    places along the innermost dim
    """

    outer: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    dims: int
    width: int

    @property
    def rows(self) -> int:
        return prod(self.outer)

    def launch(self) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
        """(grid, the kernel's last arguments, its constants): each operand's strides, the last two outer sizes, rows,
        width and tiles a row."""
        tile = walk_tile(self.rows, self.width)
        blocks = common.cdiv(self.width, tile.cols)
        grid = (common.cdiv(self.rows, tile.rows) * blocks,)
        flat = tuple(step for operand in self.strides for step in operand)
        constants = {"DIMS": self.dims, "ROWS": tile.rows, "COLS": tile.cols, **tile.options}
        return grid, (*flat, *self.outer[1:], self.rows, self.width, blocks), constants


def walk(out: Tensor, *ins: Tensor) -> Walk:
    """Over `out`'s places, in the order of its memory; `ins` are expanded to its shape (their order: before out)."""
    operands = [tensor.expand(out.shape).stride() for tensor in ins] + [out.stride()]
    dims = collapse(out.shape, operands, by=len(ins))
    dims = dims or [(1, (1,) * len(operands))]
    dims = dims if len(dims) > 1 else [(1, (0,) * len(operands)), *dims]
    sizes, steps = padded(dims[:-1])
    width, inner = dims[-1]
    strides = tuple((*step, last) for step, last in zip(steps, inner, strict=True))
    return Walk(outer=tuple(sizes), strides=strides, dims=len(dims) - 1, width=width)


MAX_SPLITS = 512
"""Programs that share one launch's sums: about four for each multiprocessor of an H100."""


def walk_tile(rows: int, width: int) -> common.Tile:
    """Elementwise: 1024 values, 8 a thread (16 bytes of bfloat16). Short rows share a program.

    A width that is no power of two is cut where one divides it, down to 64 columns (a whole 128-byte line of bfloat16),
    so that few places of a tile stay empty: rows of 576 in nines of 64.
    """
    cols = min(common.next_power_of_2(width), 1024)
    if rows > 1 and width < 4096:
        cols = min(cols, max(width & -width, 64))
    high = min(1024 // cols, common.next_power_of_2(rows))
    return common.Tile(rows=high, cols=cols, num_warps=_warps(high * cols, 8))


def sum_tile(kept: int, reduced: int, *, along_rows: bool) -> common.Tile:
    """Sums of `reduced` places each (the tile's rows) for `kept` results (its columns), 16 values a thread: along a
    contiguous dim in steps of 1024 places, else 64 contiguous results at once."""
    if along_rows:
        rows = min(common.next_power_of_2(reduced), 1024)
        cols = min(1024 // rows, common.next_power_of_2(kept))
    else:
        cols = min(common.next_power_of_2(kept), 64)
        rows = min(2048 // cols, common.next_power_of_2(reduced))
    return common.Tile(rows=rows, cols=cols, num_warps=_warps(rows * cols, 16))


def sum_share(kept: int, reduced: int, tile: common.Tile) -> int:
    """Tiles that one program sums: four at least, so that a split is worth a second launch."""
    splits = max(MAX_SPLITS // common.cdiv(kept, tile.cols), 1)
    return max(common.cdiv(common.cdiv(reduced, tile.rows), splits), 4)


def _warps(values: int, per_thread: int) -> int:
    return min(max(values // (32 * per_thread), 1), 8)
