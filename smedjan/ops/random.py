"""Random masks as a pure function of (seed, step, micro-batch, site, element): the same on every backend and resume."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import cast, mul, scale


@op(cost=lambda node: 60 * node.outputs[0].numel, pure=False)
def keep_mask(key: Tensor, *, shape: tuple[int, ...], p: float, site: int) -> Spec:
    """m = 1 with probability 1 - p, else 0: float32 `shape`.

    Philox4x32-10 (Salmon et al. 2011). key is int64 [4] = (seed low, seed high, step, micro-batch): the Philox key is
    (seed low, seed high), the counter of element i is (i // 4, site, step, micro-batch) and its word is i % 4.
    m = (word >> 8) >= round(p * 2^24).
    """
    require(0.0 <= p < 1.0, f"keep_mask: p = {p}")
    require(key.shape == (4,), f"keep_mask: key {key.shape}")
    return Spec(shape, "float32")


@op(pure=False)
def dropout(x: Tensor, key: Tensor, *, p: float, site: int) -> Spec:
    """y = x m / (1 - p), m from `keep_mask`"""
    return x.like()


@dropout.decompose
def _(x, key, *, p, site):
    mask = cast(keep_mask(key, shape=x.shape, p=p, site=site), x.dtype)
    return scale(mul(x, mask), factor=1.0 / (1.0 - p))


@dropout.vjp
def _(dys, ins, outs, needs, acc, *, p, site):
    return (dropout(dys[0], ins[1], p=p, site=site), None)
