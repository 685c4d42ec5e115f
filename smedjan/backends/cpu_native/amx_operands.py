"""How operands of products on AMX lie in memory, for amx.py and amx_float32.py."""

from __future__ import annotations

from torch import Tensor


def lies(x: Tensor, *, depth_last: bool) -> tuple[int, int]:
    """The pitch of an operand, and 1 where its depth is outermost in memory."""
    down, along = x.stride()
    rows_whole = along == 1 or x.shape[1] == 1
    assert rows_whole or down == 1 or x.shape[0] == 1, f"strides {x.stride()} of {tuple(x.shape)}"
    return (down, int(not depth_last)) if rows_whole else (along, int(depth_last))


def up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
