"""The update of plans: one call for the norm, one for every parameter of a bucket. Formulas in native/src/update.c."""

from __future__ import annotations

from functools import partial
from math import sqrt

import torch
from torch import Tensor

from smedjan.backends.cpu_native import native
from smedjan.backends.cpu_native.native.team import call, step, threads
from smedjan.backends.cpu_native.table import DTYPES, PLANNED, compiled
from smedjan.backends.planned.launch import Launches
from smedjan.graph.node import Node
from smedjan.ops.optimizer import split_bucket

LINE = 8
"""float64 numbers of a cache line: each thread sums into one of its own."""


KERNELS = {("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")}
"""Dtypes of a parameter (or its master) and of its moments."""


def _plain(node: Node) -> bool:
    """State of a dtype that kernels have, rounded to the nearest; whole numbers of a step on the host."""
    attrs = node.attrs
    if attrs["eight_bit"] or any(attrs["stochastic"]) or attrs["narrow"] not in ("", "bfloat16"):
        return False
    bucket = split_bucket(node.inputs, attrs["sites"], eight_bit=False, narrow=attrs["narrow"])
    lists = zip(bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs, strict=True)
    return native.available() and all(
        (p.dtype, m.dtype) in KERNELS and m.dtype == v.dtype and g.dtype in DTYPES.values() for p, g, m, v in lists
    )


def numbers(lr: float, step: int, *, beta1: float, beta2: float, weight_decay: float) -> list[float]:
    """What a kernel reads of a step, folded in float64, as torch folds it, and rounded once."""
    return [1.0 - lr * weight_decay, lr / (1.0 - beta1**step), sqrt(1.0 - beta2**step)]


@PLANNED.kernel("adamw_bucket", label="native adamw", supports=_plain, scalars=True)
def adamw_bucket(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    sites: tuple[int, ...],
    narrow: str,
    **_: object,
) -> None:
    bucket = split_bucket(ins, sites, eight_bit=False, narrow=narrow)
    lr, number, _seed, grad_scale, norm = bucket.scalars
    if norm is not None and norm.dtype != torch.float32:
        wide = run.scratch((), torch.float32)
        run.library("aten copy", Tensor.copy_, wide, norm)
        norm = wide
    folded = run.host(partial(numbers, beta1=beta1, beta2=beta2, weight_decay=weight_decay), lr, number)
    lists = (bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs)
    narrows = bucket.narrows or (None,) * len(sites)
    steps = [
        step(
            "_".join(("adamw", *(DTYPES[t.dtype] for t in (param, grad, moments[0])))),
            (param, grad, *moments, narrowed, folded, grad_scale, norm),
            (param.numel(),),
            (1.0 - beta1, beta2, 1.0 - beta2, eps),
        )
        for param, grad, *moments, narrowed in zip(*lists, narrows, strict=True)
        if param.numel()
    ]
    if steps:
        call(run, "adamw", *steps)


def _norm(run: Launches, grads: tuple, norm: Tensor | None, coefficient: Tensor | None, max_norm: float) -> None:
    """The sum is float64's: which thread adds what changes it by less than float32's rounding of the norm."""
    parts = run.scratch((threads() * LINE,), torch.float64)
    run.library("aten zero", Tensor.zero_, parts)
    steps = [step(f"squares_{DTYPES[grad.dtype]}", (grad, parts), (grad.numel(),)) for grad in grads if grad.numel()]
    if steps:
        call(run, "squares", *steps)
    call(run, "norm", step("norm", (parts, norm, coefficient), (threads(),), (max_norm,)))


@PLANNED.kernel("global_norm", label="native global_norm", supports=compiled)
def global_norm(run: Launches, ins: tuple, outs: tuple) -> None:
    made = outs[0] if outs[0].dtype == torch.float32 else run.scratch((), torch.float32)
    _norm(run, ins, made, None, 0.0)
    if made is not outs[0]:
        run.library("aten copy", Tensor.copy_, outs[0], made)


@PLANNED.kernel("norm_and_clip", label="native global_norm", supports=compiled)
def norm_and_clip(run: Launches, ins: tuple, outs: tuple, *, max_norm: float) -> None:
    norm, coefficient = outs
    _norm(run, ins, norm, coefficient, max_norm)
