"""Activations and their gradients on Triton: rules over `kernels/activation.py`. Formulas there."""

from __future__ import annotations

from torch import Tensor

from smedjan.backends.cuda_triton.elementwise import binary, same_place
from smedjan.backends.cuda_triton.kernels import activation as kernels
from smedjan.backends.cuda_triton.layout import walk
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches

CURVES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""The kernels' name for each name in `hidden_act`."""

GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def forward(run: Launches, x: Tensor, y: Tensor, curve: str) -> None:
    """y = act(x)"""
    if y.numel():
        grid, places, constants = walk(y, x).launch()
        run.kernel(kernels.act_fwd, grid, x, y, *places, ACT=curve, **constants)


def backward(run: Launches, dy: Tensor, x: Tensor, dx: Tensor, curve: str) -> None:
    """dx = dy * act'(x)"""
    if dx.numel():
        grid, places, constants = walk(dx, dy, x).launch()
        run.kernel(kernels.act_bwd, grid, dy, x, dx, *places, ACT=curve, **constants)


def _rules(op_name: str, curve: str) -> None:
    """The op, and its gradient from its input."""

    def fwd(run: Launches, ins: tuple, outs: tuple) -> None:
        (x,), (y,) = ins, outs
        forward(run, x, y, curve)

    def bwd(run: Launches, ins: tuple, outs: tuple) -> None:
        (dy, x), (dx,) = ins, outs
        backward(run, dy, x, dx, curve)

    RULES.kernel(op_name, label=f"triton {op_name}", inplace=same_place, strided=True)(fwd)
    RULES.kernel(f"{op_name}_bwd", label=f"triton {op_name}_bwd", inplace=same_place, strided=True)(bwd)


_rules("silu", "silu")
_rules("gelu_new", "gelu_tanh")
_rules("relu2", "relu2")


@RULES.kernel("gelu", label="triton gelu", inplace=same_place, strided=True)
def gelu(run: Launches, ins: tuple, outs: tuple, *, approximate: str) -> None:
    (x,), (y,) = ins, outs
    forward(run, x, y, GELU[approximate])


@RULES.kernel("gelu_bwd", label="triton gelu_bwd", inplace=same_place, strided=True)
def gelu_bwd(run: Launches, ins: tuple, outs: tuple, *, approximate: str) -> None:
    (dy, x), (dx,) = ins, outs
    backward(run, dy, x, dx, GELU[approximate])


def _from_result(op_name: str) -> None:
    """The op, and its gradient from its result."""

    def fwd(run: Launches, ins: tuple, outs: tuple) -> None:
        (x,), (y,) = ins, outs
        forward(run, x, y, op_name)

    def bwd(run: Launches, ins: tuple, outs: tuple) -> None:
        (dy, y), (dx,) = ins, outs
        binary(run, dy, y, dx, f"{op_name}_bwd")

    RULES.kernel(op_name, label=f"triton {op_name}", inplace=same_place, strided=True)(fwd)
    RULES.kernel(f"{op_name}_bwd", label=f"triton {op_name}_bwd", inplace=same_place, strided=True)(bwd)


_from_result("tanh")
_from_result("relu")
