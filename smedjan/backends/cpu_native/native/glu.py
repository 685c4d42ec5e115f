"""Gated linear units in one pass."""

from __future__ import annotations

from smedjan.backends.cpu_native.native.tape import dtype_of
from smedjan.backends.cpu_native.table import RULES

NUMBERS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3, "relu2": 4}
"""The enum of src/glu.c."""


@RULES.native("glu", kernel="glu")
def glu(tape, ins, outs, *, act):
    tape.add(f"glu_{dtype_of(ins[0])}", (*ins, *outs), (ins[0].numel(), NUMBERS[act]))
