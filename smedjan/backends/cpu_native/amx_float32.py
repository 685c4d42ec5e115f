"""Products of float32 on AMX's tiles (native/src/amx_float32.c): each number as the exact sum of three of bfloat16, six
products of which leave out at most two roundings of a product in float32. Totals are float32, nearer the truth than
MKL's, which rounds them more often.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from smedjan.backends.cpu_native.amx_operands import lies, up
from smedjan.backends.cpu_native.native.team import call, step, threads
from smedjan.backends.planned.launch import Launches

SWITCH = "SMEDJAN_AMX_FLOAT32"
"""Environment variable: 0 leaves products of float32 to MKL. AMX at full rate is 1.3 to 1.6 times as fast; on a shared
host it was seen to run at a third of that rate for minutes, and then is 0.85 times as fast."""

LABEL = "native product on AMX, three terms"

BLOCK, TERMS = 32, 3
"""Of src/amx_float32.c: rows and columns at a time, and numbers of the depth; terms of a number."""

PART = 1024
"""The longest part of the depth that is taken at once; parts are added in float32."""

PANELS, PANELS_BYTES = 16, 1200 << 10
"""Panels of b in tiles at a time, and their bytes: they share a core's second cache, 2 MB on CPUs with AMX, with a
block of rows and results."""

SHARES = 3
"""Of the columns, for each thread at least, so that a slow core takes fewer: a is read once for each."""

OPERAND_BYTES = 8 << 20
"""Of a in tiles at a time."""

LEAST = 96
"""Rows, columns and depth from which tiles pay: below, an operand is put in them for too few products. With 96 rows of
SmolLM2's widths they are 1.06 to 1.6 times as fast as MKL, with 64 rows dx is at 0.9 (2026-11-30, AMX at full rate)."""


def large(rows: int, columns: int, depth: int) -> bool:
    return min(rows, columns, depth) >= LEAST


def wanted() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


def product(run: Launches, a: Tensor, b: Tensor, out: Tensor, *, plus: Tensor | None = None) -> None:
    """out = a b (+ plus: a row for all, or an array of out's shape)       a [M, K], b [K, N] -> out [M, N], float32

    a and b lie in rows or in columns, of any pitch.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    if not rows or not columns:
        return
    part = up(-(-depth // max(1, -(-depth // PART))), BLOCK) or BLOCK
    panel = BLOCK * part * TERMS * 2
    group = max(1, min(PANELS, PANELS_BYTES // panel, up(columns, BLOCK) // BLOCK // (SHARES * threads())))
    many = min(max(1, OPERAND_BYTES // panel) * BLOCK, rows)
    tiles = run.scratch((up(many, BLOCK) * part * TERMS,), torch.bfloat16)
    taken = run.scratch((1,), torch.int64)
    room = run.scratch((threads(), group * BLOCK * part * TERMS), torch.bfloat16)
    for row in range(0, rows, many):
        here = slice(row, min(row + many, rows))
        made, more = out[here], plus if plus is None or plus.ndim == 1 else plus[here]
        for k in range(0, max(depth, 1), part):
            one, other = a[here, k : k + part], b[k : k + part]
            height, deep = one.shape
            call(run, "split", step("amx_split", (one, tiles, taken), (height, deep, *lies(one, depth_last=True))))
            plus_pitch = 0 if more is None or more.ndim == 1 else more.stride(0)
            numbers = (height, columns, deep, *lies(other, depth_last=False), plus_pitch, made.stride(0), group)
            call(run, "product", step("amx_float32", (tiles, other, more, made, room, taken), numbers))
            more = made
