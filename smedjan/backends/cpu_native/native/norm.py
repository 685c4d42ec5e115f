"""Root-mean-square norms, alone and of a residual sum, and the sums and factors between blocks."""

from __future__ import annotations

from smedjan.backends.cpu_native.native.tape import dtype_of
from smedjan.backends.cpu_native.table import RULES, floats


@RULES.native("rms_norm", kernel="rms_norm")
def rms_norm(tape, ins, outs, *, eps, weight_cast, offset):
    x, weight = ins
    shape = (x.numel() // x.shape[-1], x.shape[-1], weight_cast == "before")
    tape.add(f"rms_norm_{dtype_of(x)}", (x, weight, *outs), shape, (eps, offset))


@RULES.native("add_rms_norm", kernel="add + rms_norm")
def add_rms_norm(tape, ins, outs, *, eps, weight_cast, offset, factor):
    x = ins[0]
    shape = (x.numel() // x.shape[-1], x.shape[-1], weight_cast == "before")
    tape.add(f"add_rms_norm_{dtype_of(x)}", (*ins, *outs), shape, (eps, offset, factor))


def _alike(node):
    return floats(node) and node.inputs[0].spec == node.inputs[1].spec


@RULES.native("add", kernel="add", supports=_alike)
def add(tape, ins, outs):
    tape.add(f"add_{dtype_of(ins[0])}", (*ins, *outs), (ins[0].numel(),), (1.0,))


@RULES.native("scale", kernel="scale")
def scale(tape, ins, outs, *, factor):
    tape.add(f"scale_{dtype_of(ins[0])}", (*ins, *outs), (ins[0].numel(),), (factor,))
