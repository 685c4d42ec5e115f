"""Products of 8-bit integers in plans: rows are coded once for all layers of a group, their codes lie in one stack.

Formulas in native/src/w8a8_rows.c, which gives torch_reference's bits. Without a compiler its rule runs, slower than
the float product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from smedjan.backends.cpu_native import lora, native
from smedjan.backends.cpu_native.narrow import Aten, Narrow, Native
from smedjan.backends.cpu_native.native.team import call, step
from smedjan.backends.cpu_native.table import DTYPES, PLANNED
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows
from smedjan.backends.torch_reference import w8a8 as reference
from smedjan.graph.node import Node
from smedjan.ops.w8a8 import SMALLEST_ROW, count_of, parts

ATEN = "aten, in float64"
WAYS = ("AVX-512 VNNI", "AVX-VNNI", "AVX2", "plain C")
"""Of src/w8a8_rows.c, by the CPU's instructions: a kernel library has one of them."""

PANEL, ROWS, QUAD = 32, 12, 4
"""Of src/w8a8_rows.c: rows of W in a panel, the most rows of x (HEIGHT) in a tile, columns that one instruction takes.
A tile reads all its rows, those behind the last one too."""


def _has(way: str, node: Node) -> bool:
    x = node.inputs[0]
    assert x is not None
    return x.dtype in DTYPES.values() and native.available() and _way() == way


def _way() -> str:
    function = native.library().smedjan_w8a8_way
    function.restype = ctypes.c_char_p
    return function().decode()


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def product(
    run: Launches, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor, *, compiled: bool
) -> None:
    """y = w8a8(x, codes scale) + bias       x [M, I], codes [O, I], scale [O], bias [O] -> y [M, O]"""
    (rows, width), outs, dtype = x.shape, codes.shape[0], DTYPES[x.dtype]
    if rows == 0:
        return
    if not compiled:
        run.library("aten w8a8", _reference, x, codes, scale, bias, y)
        return
    pitch = _up(width, QUAD)
    coded = run.scratch((_up(rows, ROWS), pitch), torch.uint8)
    row_scale = run.scratch((rows,), torch.float32)
    panels = run.scratch((_up(outs, PANEL), pitch), torch.int8)
    taken = run.scratch((_up(outs, PANEL),), torch.int32)
    call(
        run,
        "w8a8 codes",
        step(f"code_rows_{dtype}", (x, coded, row_scale), (rows, width, x.stride(0), pitch), (SMALLEST_ROW,)),
        step("code_panels", (codes, panels, taken), (outs, width)),
    )
    arrays = (coded, row_scale, panels, taken, scale, bias, y)
    call(run, "w8a8 product", step(f"code_product_{dtype}", arrays, (rows, outs, pitch, y.stride(0))))


def _reference(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    y.copy_(reference.product(x, codes, scale, bias))


def _stacked(
    run: Launches, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor], compiled: bool
) -> lora.Base:
    def base(x: Tensor, y: Tensor) -> None:
        bias = run.stacked(biases) if biases else None
        product(run, x, run.stacked(codes), run.stacked(scales), bias, y, compiled=compiled)

    return base


def _linear(run: Launches, ins: tuple, outs: tuple, *, biased: bool, compiled: bool) -> None:
    x, *tensors = ins
    _, codes, scales, biases, _, _ = parts(tensors, count_of(tensors, biased), biased)
    _stacked(run, codes, scales, biases, compiled)(as_rows(x), as_rows(outs[0]))


def _lora(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    adapted: tuple[bool, ...],
    biased: bool,
    scaling: float,
    compiled: bool,
    narrow: type[Narrow],
) -> None:
    x, *tensors = ins
    weights, codes, scales, biases, a, b = parts(tensors, len(adapted), biased, sum(adapted))
    base = _stacked(run, codes, scales, biases, compiled)
    lora.forward(run, x, base, lora.adapted_columns(weights, adapted), a, b, outs, narrow=narrow, scaling=scaling)


def _has_narrow(way: str, node: Node) -> bool:
    return _has(way, node) and Native.fits(node.inputs[0], lora.made(node))


_aten_adapters, _native_adapters = (partial(_lora, narrow=each) for each in (Aten, Native))
PLANNED.kernel("w8a8_linear", label=ATEN)(partial(_linear, compiled=False))
PLANNED.kernel("w8a8_lora_linear", label=ATEN)(partial(_aten_adapters, compiled=False))
for _each in WAYS:
    _label, _supports = f"native w8a8, {_each}", partial(_has, _each)
    for _name, _bind in (("w8a8_linear", _linear), ("w8a8_lora_linear", _aten_adapters)):
        PLANNED.kernel(_name, label=_label, supports=_supports)(partial(_bind, compiled=True))
    PLANNED.kernel("w8a8_lora_linear", label=f"{_label} + {Native.label}", supports=partial(_has_narrow, _each))(
        partial(_native_adapters, compiled=True)
    )


def error(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    """Of what a plan runs, which is the reference's to the bit."""
    return reference.error(_run, x, weight, codes, scale)


def _run(*ins: Tensor) -> Tensor:
    return PLANNED.lower(node_of("w8a8_linear", ins, {})).run(*ins, biased=False)
