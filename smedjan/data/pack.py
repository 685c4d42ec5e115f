"""Packing: documents into rows of at most `max_length` tokens, by best fit, longest first.

No two rows could be one, so their number is below 2 * sum(lengths) / max_length (or 1); in practice it is within a
percent of the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Indices of the documents of each row, rows in the order they were opened. A pure function of its arguments.

    Each document, the longest first (equal ones by index), goes to the fullest row that still holds it, of equally full
    ones to the oldest. O(n log n).
    """
    assert max_length >= 1, max_length
    assert all(1 <= length <= max_length for length in lengths), "a document is empty or longer than a row"
    rows: list[list[int]] = []
    # room[r]: the rows with r free tokens; bit r of `rooms` is set while there are any
    room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if fitting := rooms >> length:
            free = length + (fitting & -fitting).bit_length() - 1
            row = heappop(room[free])
            if not room[free]:
                rooms &= ~(1 << free)
        else:
            free, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        heappush(room[free - length], row)
        rooms |= 1 << (free - length)
    return rows
