"""Rows picked by index."""

from __future__ import annotations

from smedjan.backends.cpu_native.table import RULES


def _gather(tape, table, index, y):
    tape.add("gather_rows", (table, index, y), (index.numel(), table.shape[-1] * table.element_size()))


@RULES.native("embedding", kernel="gather", supports=lambda node: True)
def embedding(tape, ins, outs, *, padding_idx):
    ids, weight = ins
    _gather(tape, weight, ids, outs[0])


@RULES.native("take_rows", kernel="gather")
def take_rows(tape, ins, outs):
    x, rows = ins
    _gather(tape, x, rows, outs[0])
