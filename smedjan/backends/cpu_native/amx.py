"""Products of bfloat16 on AMX's tiles (native/src/amx_product.c): no shape costs anything the first time, nothing is
kept between calls, and a waiting total is added in float32 before the one rounding. oneDNN makes a primitive of 0.8 MB
for each shape, in 2 to 17 ms, and keeps a thousand.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from smedjan.backends.cpu_native import native
from smedjan.backends.cpu_native.amx_operands import lies, up
from smedjan.backends.cpu_native.native.team import call, step, threads
from smedjan.backends.planned.launch import Launches

LABEL = "native product on AMX"
CALL = "product"

BLOCK, DEPTH, HELD = 32, 32, 1024
"""Of src/amx_product.c: rows and columns at a time, the depth of a tile, rows whose sums wait."""

WHOLE, PART = 2048, 1024
"""The longest depth that is taken at once, and parts of a longer one, at the most."""

PANELS, PANELS_BYTES = 16, 768 << 10
"""Panels of b in tiles at a time, and their bytes: they share a core's second cache with rows of a and results."""

PANELS_OF_PARTS = 4
"""Where sums wait: 512 kB of them."""


@cache
def _granted(library: str) -> bool:
    return bool(native.library().smedjan_amx())


def available() -> bool:
    """The kernels are compiled for AMX, and Linux has given this process its tiles."""
    return native.available() and _granted(native.library()._name)


def product(run: Launches, a: Tensor, b: Tensor, out: Tensor, *, plus: Tensor | None = None) -> None:
    """out = a b (+ plus: a row for all, or an array of out's shape)       a [M, K], b [K, N] -> out [M, N]

    a and b are bfloat16 and lie in rows or in columns, of any pitch; out and plus are bfloat16, or float32.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    if not rows or not columns:
        return
    assert plus is None or plus.dtype == out.dtype, f"{plus.dtype} is added to {out.dtype}"
    part, group = _parts(depth)
    pitches = (*lies(a, depth_last=True), *lies(b, depth_last=False))
    room = run.scratch((threads(), _room(depth, part, group)), torch.uint8)
    plus_pitch = 0 if plus is None or plus.ndim == 1 else plus.stride(0)
    numbers = (rows, columns, depth, *pitches, plus_pitch, out.stride(0), group, part, int(out.dtype == torch.float32))
    call(run, CALL, step("amx_product", (a, b, plus, out, room), numbers))


def _parts(depth: int) -> tuple[int, int]:
    """How much of the depth is taken at a time, and for how many panels."""
    if depth > WHOLE:
        return up(-(-depth // -(-depth // PART)), DEPTH), PANELS_OF_PARTS
    part = max(up(depth, DEPTH), DEPTH)
    return part, max(1, min(PANELS, PANELS_BYTES // (BLOCK * part * 2)))


def _room(depth: int, part: int, group: int) -> int:
    """Bytes of a thread."""
    held = 2 if depth <= part else HELD // BLOCK * group
    return (1 + group) * BLOCK * part * 2 + held * BLOCK * BLOCK * 4
