"""The cache's newest place, and attention of one query over all that is filled."""

from __future__ import annotations

from smedjan.backends.cpu_native.native.tape import dtype_of
from smedjan.backends.cpu_native.table import RULES, floats


@RULES.native("kv_write", kernel="kv_write")
def kv_write(tape, ins, outs):
    cache, kv, start = ins
    tape.add("kv_write", (cache, kv, start), (cache.shape[1], cache.shape[2], kv.shape[3] * kv.element_size()))


def _plain(node):
    return floats(node) and node.inputs[3] is None and node.inputs[5] is None


@RULES.native("cached_attention", kernel="attention of one query", supports=_plain)
def cached_attention(tape, ins, outs, *, scale, window, cap):
    q, k, v, _, length, _ = ins
    scores = tape.scratch((q.shape[1], k.shape[2]))
    numbers = (q.shape[1], k.shape[1], k.shape[2], q.shape[3], window)
    tape.add(f"cached_attention_{dtype_of(q)}", (q, k, v, length, *outs, scores), numbers, (scale, cap))
