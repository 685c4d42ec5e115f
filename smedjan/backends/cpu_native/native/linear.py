"""Products of one row with weights that are read once: float32, bfloat16 widened to it, and int8 with a row's scale."""

from __future__ import annotations

from smedjan.backends.cpu_native.native.tape import dtype_of
from smedjan.backends.cpu_native.table import RULES
from smedjan.ops.linear import members

WEIGHTS = 4
"""Weights of one step."""


def _write(tape, kernel, x, y, weights, biases, scales=()):
    count = len(weights)
    spare = (None,) * (WEIGHTS - count)
    arrays = (x, y, *weights, *spare, *biases, *spare, *scales)
    tape.add(f"{kernel}_{dtype_of(x)}", arrays, (x.shape[-1], count, *(weight.shape[0] for weight in weights)))


@RULES.native("linear", kernel="matvec")
def linear(tape, ins, outs):
    x, weight, bias = ins
    _write(tape, "linear", x, outs[0], (weight,), (bias,))


def _few(node):
    return (
        node.inputs[0].dtype in ("float32", "bfloat16") and len(members(node.inputs[1:], node.attrs["biased"])[0]) <= 4
    )


@RULES.native("linear_group", kernel="stacked matvec", supports=_few)
def linear_group(tape, ins, outs, *, biased):
    _write(tape, "linear", ins[0], outs[0], *members(ins[1:], biased))


@RULES.native("int8_linear", kernel="int8 matvec")
def int8_linear(tape, ins, outs):
    x, codes, scale, bias = ins
    _write(tape, "int8_linear", x, outs[0], (codes,), (bias,), (scale,))
