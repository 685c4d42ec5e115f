"""The language-model heads on Triton and cuBLAS: rules over `kernels/loss.py`. Formulas there.

Logits are cuBLAS's, in x's dtype as in transformers, of a chunk of rows: one scratch buffer takes them, then their
gradient, then the next chunk's. Liger Kernel (Hsu et al., 2024); "Cut Your Losses" (Wijmans et al., 2024) goes further
and keeps no chunk in memory, for which it makes them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import loss as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.rows import as_rows
from smedjan.graph.node import Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """z of a logit: gain times it, bent by a cap (0: none), over a temperature."""

    gain: float
    cap: float

    @classmethod
    def of(cls, *, scaling: float, divisor: float, cap: float, temperature: float = 1.0) -> Shaping:
        return cls(gain=scaling / divisor / temperature, cap=cap / temperature)

    @property
    def capped(self) -> bool:
        return self.cap != 0.0

    @property
    def tilt(self) -> float:
        return self.gain / self.cap if self.capped else 1.0

    @property
    def unit(self) -> float:
        return self.cap if self.capped else self.gain


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """logits of some rows of x [R, D] by weight [V, D], in `buffer` [chunk, width]; `width` is V padded."""

    x: Tensor
    weight: Tensor
    buffer: Tensor

    @classmethod
    def of(cls, run: Launches, x: Tensor, weight: Tensor, chunk: int) -> Head:
        assert x.dtype == weight.dtype, f"x {x.dtype}, weight {weight.dtype}"
        width = common.padded_vocab(weight.shape[0])
        return cls(x=as_rows(x), weight=weight, buffer=run.scratch((chunk, width), x.dtype))

    def logits(self, run: Launches, rows: slice) -> Tensor:
        made = self.buffer[: rows.stop - rows.start, : self.weight.shape[0]]
        run.library("cublas mm", torch.mm, self.x[rows], self.weight.t(), out=made)
        return made


class Gradients:
    """dx = dlogits weight and dweight = dlogits^T x, a chunk of rows at a time; None where nobody reads it.

    dweight is summed in float32 over the chunks and rounded once. Of a single chunk the product is the sum.
    """

    def __init__(self, run: Launches, head: Head, dx: Tensor | None, dweight: Tensor | None) -> None:
        self.head = head
        self.dx = None if dx is None else as_rows(dx)
        self.dweight = dweight
        several = head.x.shape[0] > head.buffer.shape[0]
        apart = several and dweight is not None and dweight.dtype != torch.float32
        self.total = run.scratch(tuple(head.weight.shape), torch.float32) if apart else dweight

    @property
    def wanted(self) -> bool:
        return self.dx is not None or self.dweight is not None

    def add(self, run: Launches, dlogits: Tensor, rows: slice) -> None:
        if self.dx is not None:
            run.library("cublas mm", torch.mm, dlogits, self.head.weight, out=self.dx[rows])
        if self.total is None:
            return
        product = (dlogits.t(), self.head.x[rows])
        mixed = {} if self.total.dtype == dlogits.dtype else {"out_dtype": self.total.dtype}
        # torch has no mixed product on the CPU, where Triton's interpreter runs.
        widened = bool(mixed) and run.device.type == "cpu"
        if rows.start == 0:
            run.library("cublas mm", _wide_mm if widened else torch.mm, *product, **mixed, out=self.total)
        else:
            call = _wide_addmm if widened else torch.addmm
            run.library("cublas addmm", call, self.total, *product, **mixed, out=self.total)

    def finish(self, run: Launches) -> None:
        if self.total is None or self.dweight is None or self.total is self.dweight:
            return
        tile, count = common.flat_tile(), self.dweight.numel()
        blocks = common.cdiv(count, tile.cols)
        run.kernel(kernels.rounded, (blocks,), self.total, self.dweight, count, COLS=tile.cols, **tile.options)


def _wide_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)


def _wide_addmm(c: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    return torch.addmm(c, a.to(out_dtype), b.to(out_dtype), out=out)


def _row_launch(
    run: Launches,
    kernel: Callable,
    logits: Tensor,
    *args: Tensor | float | None,
    beside: Tensor | None = None,
    **constants: bool,
) -> None:
    """A program a row of `logits`, and of those `beside` them: kernel(logits, *args, strides, vocab, width)."""
    rows, vocab = logits.shape
    width = common.padded_vocab(vocab)
    assert logits.stride(1) == 1, f"rows are not contiguous: strides {logits.stride()}"
    assert logits.stride(0) >= width, f"rows of {vocab} lie {logits.stride(0)} apart: not padded"
    strides = [logits.stride(0)] + ([] if beside is None else [beside.stride(0)])
    tile = common.vocab_tile(width, logits.element_size(), heads=len(strides))
    run.kernel(
        kernel,
        (rows,),
        logits,
        *args,
        *strides,
        vocab,
        width,
        RUNS=tile.rows,
        RUN=tile.cols,
        **constants,
        **tile.options,
    )


def cross_entropy(
    run: Launches,
    logits: Tensor,
    labels: Tensor,
    num_items: Tensor,
    losses: Tensor | None,
    shaping: Shaping,
    *,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
    gradient: bool,
) -> None:
    """logits [R, V] -> losses [R] float32, unless None; with `gradient`, dlogits over them."""
    if losses is None and not gradient:
        return
    given = (labels, num_items, losses, shaping.tilt, shaping.unit, shaping.gain, z_loss, smoothing or None)
    _row_launch(run, kernels.cross_entropy, logits, *given, CAPPED=shaping.capped, GRADIENT=gradient)


def _sum(run: Launches, losses: Tensor, num_items: Tensor, loss: Tensor) -> None:
    tile, count = common.sum_tile(), losses.numel()
    run.kernel(kernels.sum_losses, (1,), losses, num_items, loss, count, COLS=tile.cols, **tile.options)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _nothing(run: Launches, *outs: Tensor | None) -> None:
    """The results of no rows."""
    for out in outs:
        if out is not None and out.numel():
            run.zero(out)


def _rising(node: Node) -> bool:
    """A gain above zero: the largest logit is the largest z."""
    attrs = node.attrs
    gains = [attrs["scaling"] / attrs["divisor"]]
    if "teacher_scaling" in attrs:
        gains.append(attrs["teacher_scaling"] / attrs["teacher_divisor"])
    return min(gains) > 0.0


@RULES.kernel("linear_cross_entropy", label="triton cross_entropy + cublas mm", supports=_rising)
def linear_cross_entropy(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    grads: str,
    scaling: float,
    divisor: float,
    cap: float,
    z_loss: float,
    smoothing: float,
) -> None:
    """x [..., D], weight [V, D], labels [R], num_items [] -> loss [], dx, dweight for a cotangent of one."""
    x, weight, labels, num_items = ins
    loss, dx, dweight = outs
    dx, dweight = dx if "x" in grads else None, dweight if "w" in grads else None
    rows = labels.shape[0]
    if rows == 0:
        return _nothing(run, loss, dx, dweight)
    assert labels.is_contiguous()
    chunk = common.chunk_rows(rows, weight, 1, summed=dweight is not None)
    head = Head.of(run, x, weight, chunk)
    gradients = Gradients(run, head, dx, dweight)
    shaping = Shaping.of(scaling=scaling, divisor=divisor, cap=cap)
    losses = None if loss is None else run.scratch((rows,), torch.float32)
    how = {"z_loss": z_loss, "smoothing": smoothing}
    for part in _chunks(rows, chunk):
        logits = head.logits(run, part)
        own = None if losses is None else losses[part]
        cross_entropy(run, logits, labels[part], num_items, own, shaping, **how, gradient=gradients.wanted)
        gradients.add(run, logits, part)
    gradients.finish(run)
    if losses is not None:
        _sum(run, losses, num_items, loss)


@RULES.kernel("linear_kl", label="triton kl + cublas mm", supports=_rising)
def linear_kl(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    grads: str,
    direction: str,
    temperature: float,
    scaling: float,
    divisor: float,
    cap: float,
    teacher_scaling: float,
    teacher_divisor: float,
    teacher_cap: float,
) -> None:
    """x [..., D], weight [V, D], teacher_x [..., D'], teacher_weight [V, D'], labels [R], num_items [] -> loss [], dx,
    dweight for a cotangent of one. Both heads' logits are a chunk."""
    x, weight, teacher_x, teacher_weight, labels, num_items = ins
    loss, dx, dweight = outs
    dx, dweight = dx if "x" in grads else None, dweight if "w" in grads else None
    rows = labels.shape[0]
    if rows == 0:
        return _nothing(run, loss, dx, dweight)
    assert labels.is_contiguous()
    chunk = common.chunk_rows(rows, weight, 2, summed=dweight is not None)
    head, teacher = Head.of(run, x, weight, chunk), Head.of(run, teacher_x, teacher_weight, chunk)
    gradients = Gradients(run, head, dx, dweight)
    own = Shaping.of(scaling=scaling, divisor=divisor, cap=cap, temperature=temperature)
    theirs = Shaping.of(scaling=teacher_scaling, divisor=teacher_divisor, cap=teacher_cap, temperature=temperature)
    losses = None if loss is None else run.scratch((rows,), torch.float32)
    for part in _chunks(rows, chunk):
        logits, beside = head.logits(run, part), teacher.logits(run, part)
        _row_launch(
            run,
            kernels.kl,
            logits,
            beside,
            labels[part],
            num_items,
            None if losses is None else losses[part],
            own.tilt,
            own.unit,
            own.gain,
            theirs.tilt,
            theirs.unit,
            temperature**2,
            beside=beside,
            CAPPED=own.capped,
            TEACHER_CAPPED=theirs.capped,
            REVERSE=direction == "reverse",
            GRADIENT=gradients.wanted,
        )
        gradients.add(run, logits, part)
    gradients.finish(run)
    if losses is not None:
        _sum(run, losses, num_items, loss)


@RULES.kernel("linear_log_probs", label="triton log_probs + cublas mm", supports=_rising)
def linear_log_probs(run: Launches, ins: tuple, outs: tuple, *, scaling: float, divisor: float, cap: float) -> None:
    """x [..., D], weight [V, D], labels [R] -> log p [R], lse [R], float32"""
    x, weight, labels = ins
    log_probs, lse = outs
    rows = labels.shape[0]
    if rows == 0:
        return
    assert labels.is_contiguous()
    chunk = common.chunk_rows(rows, weight, 1, summed=False)
    head, shaping = Head.of(run, x, weight, chunk), Shaping.of(scaling=scaling, divisor=divisor, cap=cap)
    for part in _chunks(rows, chunk):
        made = (None if out is None else out[part] for out in (log_probs, lse))
        given = (labels[part], *made, shaping.tilt, shaping.unit)
        _row_launch(run, kernels.log_probs, head.logits(run, part), *given, CAPPED=shaping.capped)


@RULES.kernel("linear_log_probs_bwd", label="triton log_probs_bwd + cublas mm", supports=_rising)
def linear_log_probs_bwd(
    run: Launches,
    ins: tuple,
    outs: tuple,
    *,
    needs: tuple[bool, bool],
    scaling: float,
    divisor: float,
    cap: float,
) -> None:
    """dy [R], x [..., D], weight [V, D], labels [R], lse [R] -> dx, dweight, those of them that are needed."""
    dy, x, weight, labels, lse = ins
    found = iter(outs)
    dx, dweight = (next(found) if need else None for need in needs)
    rows = labels.shape[0]
    if rows == 0:
        return _nothing(run, dx, dweight)
    assert labels.is_contiguous()
    assert lse.is_contiguous()
    assert dy.is_contiguous()
    chunk = common.chunk_rows(rows, weight, 1, summed=dweight is not None)
    head, shaping = Head.of(run, x, weight, chunk), Shaping.of(scaling=scaling, divisor=divisor, cap=cap)
    gradients = Gradients(run, head, dx, dweight)
    for part in _chunks(rows, chunk):
        logits = head.logits(run, part)
        given = (labels[part], lse[part], dy[part], shaping.tilt, shaping.unit, shaping.gain)
        _row_launch(run, kernels.log_probs_bwd, logits, *given, CAPPED=shaping.capped)
        gradients.add(run, logits, part)
    gradients.finish(run)
