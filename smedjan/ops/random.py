"""Random masks as a pure function of (seed, step, micro-batch, site, element): the same on every backend and resume."""

from __future__ import annotations

from smedjan.graph.op import op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import add, cast, mul, scale

NOISE_SITE = 2**32 - 1
"""The site of `noised`: dropout's are counted from 0, one for each adapter."""


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


@op(cost=lambda node: 60 * node.outputs[0].numel, pure=False)
def uniform(key: Tensor, *, shape: tuple[int, ...], bound: float, site: int) -> Spec:
    """y = bound u, u uniform in (-1, 1): float32 `shape`.

    Key, counter and word of each element as in `keep_mask`. u = (2 (word >> 8) + 1) / 2^24 - 1 is one of 2^24 numbers,
    symmetric about 0, and exact in float32: the same bits on every backend, `bound` multiplies once.
    """
    require(bound > 0.0, f"uniform: bound = {bound}")
    require(key.shape == (4,), f"uniform: key {key.shape}")
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


def noised(x: Tensor, key: Tensor, *, alpha: float) -> Tensor:
    """NEFTune (Jain et al. 2023, algorithm 1): y = x + alpha / sqrt(T D) u, u uniform in (-1, 1)       x [B, T, D]

    T is the padded row's, as in transformers.integrations.neftune. The noise is rounded to x's dtype, then added.
    """
    _, seq, width = x.shape
    noise = uniform(key, shape=x.shape, bound=alpha / (seq * width) ** 0.5, site=NOISE_SITE)
    return add(x, cast(noise, x.dtype))
