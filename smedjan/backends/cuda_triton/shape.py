"""Parts of a tensor and moves of heads on Triton: `planned.views`, and the copies that cannot be one."""

from __future__ import annotations

from smedjan.backends.cuda_triton.elementwise import copy_to, sum_dims
from smedjan.backends.cuda_triton.kernels import shape as kernels
from smedjan.backends.cuda_triton.layout import Walk, collapse, padded
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.planned.views import add_views

add_views(RULES)


@RULES.kernel("zeros_like", label="memset")
def zeros_like(run: Launches, ins: tuple, outs: tuple) -> None:
    run.zero(*outs)


@RULES.kernel("concat", label="memcpy, triton copy of strided parts", strided=True)
def concat(run: Launches, ins: tuple, outs: tuple, *, dim: int) -> None:
    """One copy a part."""
    (y,) = outs
    start = 0
    for part in ins:
        copy_to(run, part, y.narrow(dim, start, part.shape[dim]))
        start += part.shape[dim]


@RULES.kernel("slice_last_bwd", label="triton pad_last", strided=True)
def slice_last_bwd(run: Launches, ins: tuple, outs: tuple, *, size: int, start: int) -> None:
    (dy,), (dx,) = ins, outs
    if dx.numel() == 0:
        return
    steps = [tensor.stride() for tensor in (dy, dx)]
    dims = collapse(dx.shape[:-1], [each[:-1] for each in steps], by=1) or [(1, (0, 0))]
    sizes, strides = padded(dims)
    whole = Walk(
        outer=tuple(sizes),
        strides=tuple((*outer, each[-1]) for outer, each in zip(strides, steps, strict=True)),
        dims=len(dims),
        width=size,
    )
    grid, places, constants = whole.launch()
    run.kernel(kernels.pad_last, grid, dy, dx, start, start + dy.shape[-1], *places, **constants)


@RULES.kernel("repeat_kv", label="triton copy", strided=True)
def repeat_kv(run: Launches, ins: tuple, outs: tuple, *, times: int) -> None:
    """Each of the `times` copies of every head at once."""
    (x,), (y,) = ins, outs
    for place in range(times):
        copy_to(run, x, y[:, place::times])


@RULES.kernel("repeat_kv_bwd", label="triton sum_over")
def repeat_kv_bwd(run: Launches, ins: tuple, outs: tuple, *, times: int) -> None:
    """Batch by batch, so that K, S and D are no more dims than a kernel counts through, whatever their strides."""
    (dy,), (dx,) = ins, outs
    for grad, out in zip(dy, dx, strict=True):
        sum_dims(run, grad.unflatten(0, (-1, times)), (1,), out)
