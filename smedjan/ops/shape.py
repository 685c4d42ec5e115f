"""Parts of a tensor: slices, splits and their opposite. No arithmetic but the zeros around a slice's gradient."""

from __future__ import annotations

from itertools import accumulate

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    at = dim % len(shape)
    return (*shape[:at], size, *shape[at + 1 :])


@op
def slice_last(x: Tensor, *, start: int, stop: int) -> Spec:
    """y = x[..., start:stop]. Its gradient is padded with zeros, so that those of several slices add up."""
    require(0 <= start < stop <= x.shape[-1], f"slice_last: {start}:{stop} of {x.shape}")
    return x.like(shape=_with(x.shape, -1, stop - start))


@slice_last.vjp
def _(dys, ins, outs, needs, acc, *, start, stop):
    return (slice_last_bwd(dys[0], size=ins[0].shape[-1], start=start),)


@op
def slice_last_bwd(dy: Tensor, *, size: int, start: int) -> Spec:
    """dx[..., start : start + N] = dy, zero elsewhere       dy [..., N] -> dx [..., size]"""
    return dy.like(shape=_with(dy.shape, -1, size))


@op
def split(x: Tensor, *, sizes: tuple[int, ...], dim: int) -> tuple[Spec, ...]:
    """x cut along `dim` into pieces of `sizes`; the gradient is their concatenation"""
    require(sum(sizes) == x.shape[dim], f"split: {sizes} of {x.shape} along {dim}")
    return tuple(x.like(shape=_with(x.shape, dim, size)) for size in sizes)


@split.vjp
def _(dys, ins, outs, needs, acc, *, sizes, dim):
    given = [zeros_like(out) if dy is None else dy for dy, out in zip(dys, outs.public, strict=True)]
    return (concat(*given, dim=dim),)


@op
def zeros_like(x: Tensor) -> Spec:
    """y = 0 everywhere: the gradient of a piece that nothing reads"""
    return x.like()


@op
def concat(*parts: Tensor, dim: int) -> Spec:
    """The parts one after the other along `dim`"""
    require(len({_with(part.shape, dim, 0) for part in parts}) == 1, f"concat: {[part.shape for part in parts]}")
    return parts[0].like(shape=_with(parts[0].shape, dim, sum(part.shape[dim] for part in parts)))


@concat.vjp
def _(dys, ins, outs, needs, acc, *, dim):
    sizes = [part.shape[dim] for part in ins]
    starts = [0, *accumulate(sizes)]
    return tuple(
        narrow(dys[0], dim=dim, start=start, size=size) if need else None
        for start, size, need in zip(starts, sizes, needs, strict=False)
    )


@op
def narrow(x: Tensor, *, dim: int, start: int, size: int) -> Spec:
    """`size` places of x along `dim`, from `start` on"""
    return x.like(shape=_with(x.shape, dim, size))
