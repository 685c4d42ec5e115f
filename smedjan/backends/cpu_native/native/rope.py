"""A token's rotary tables, and the norms and rotation of its query and key heads in one pass."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native.native.tape import dtype_of
from smedjan.backends.cpu_native.table import RULES, floats
from smedjan.backends.torch_reference.rope import inverse_frequencies


def _fixed(node):
    """Frequencies that do not change with the position."""
    return node.attrs["dtype"] in ("float32", "bfloat16") and node.attrs["rope"].rope_type not in (
        "dynamic",
        "longrope",
    )


@RULES.native("rope_tables", kernel="rope tables", supports=_fixed)
def rope_tables(tape, ins, outs, *, rope, head_dim, dtype, interleaved):
    frequencies = inverse_frequencies(rope, head_dim, torch.tensor(1)).contiguous()
    numbers = (len(frequencies), interleaved)
    tape.add(f"rope_tables_{dtype}", (*ins, frequencies, *outs), numbers, (rope.attention_scaling,))


def _tables(node):
    """Tables of the heads' dtype, or wider ones."""
    x, cos = node.inputs[0], node.inputs[4]
    return floats(node) and cos.dtype in (x.dtype, "float32")


@RULES.native("qk_norm_rope", kernel="norm + rope", supports=_tables)
def qk_norm_rope(tape, ins, outs, *, eps, weight_cast, offset, interleaved, upcast):
    q, k, _, _, cos, _ = ins
    numbers = (q.shape[1], k.shape[1], q.shape[3], cos.shape[-1], interleaved, weight_cast == "before")
    tape.add(f"qk_norm_rope_{dtype_of(q)}_{dtype_of(cos)}", (*ins, *outs), numbers, (eps, offset))
