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


@RULES.native(
    "int8_embedding", kernel="int8 gather", supports=lambda node: node.attrs["dtype"] in ("float32", "bfloat16")
)
def int8_embedding(tape, ins, outs, *, dtype):
    ids, codes, scale = ins
    tape.add(f"int8_gather_{dtype}", (codes, scale, ids, *outs), (ids.numel(), codes.shape[1]))
