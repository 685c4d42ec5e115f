"""The update: gradient accumulation, global norm, clip and AdamW, all on the device.

`adamw_update` is one parameter's step in one dtype. What surrounds it where state is narrower (`dequantize_blocks`,
`quantize_blocks`, `stochastic_round`) are ops of their own; `adamw_bucket` is all of it, for many parameters at once.

A step whose gradients have a norm that is not finite changes nothing: each op of an update that is given `norm` leaves
what it would update as it was, and `keep` does so for what is made anew.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from smedjan.graph.node import Node
from smedjan.graph.op import Pairs, op, require
from smedjan.graph.tensor import Spec, Tensor
from smedjan.ops.elementwise import cast

BLOCK = 256
"""Values that share a scale in 8-bit state."""

ZERO = 127
"""The signed code of 0."""


@op(donates=0)
def accumulate(total: Tensor, grad: Tensor) -> Spec:
    """total += grad, in total's dtype"""
    require(total.shape == grad.shape, f"accumulate: {total.shape} and {grad.shape}")
    return total.like()


@op(cost=lambda node: 2 * sum(t.numel for t in node.inputs))
def global_norm(*grads: Tensor) -> Spec:
    """y = sqrt(sum of squares over every element of every gradient), as a norm of norms; float32 or the grads' dtype"""
    return Spec((), grads[0].dtype)


@op
def clip_coefficient(norm: Tensor, *, max_norm: float) -> Spec:
    """y = min(1, max_norm / (norm + 1e-6))"""
    return norm.like()


@op(cost=lambda node: 2 * sum(t.numel for t in node.inputs))
def norm_and_clip(*grads: Tensor, max_norm: float) -> tuple[Spec, Spec]:
    """global_norm and clip_coefficient, both float32 scalars whatever the gradients are"""
    return Spec((), "float32"), Spec((), "float32")


@norm_and_clip.decompose
def _(*grads, max_norm):
    norm = cast(global_norm(*grads), "float32")
    return norm, clip_coefficient(norm, max_norm=max_norm)


@op(donates=lambda node: ((0, 1),))
def keep(new: Tensor, old: Tensor, norm: Tensor) -> Spec:
    """y = new where norm, a scalar, is finite, else old: in old's place"""
    require(new.spec == old.spec and norm.shape == (), f"keep: {new} {old} {norm}")
    return old.like()


@op(donates=lambda node: ((0, 0), (1, 2), (2, 3)), cost=lambda node: 12 * node.inputs[0].numel)
def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor | None = None,
    norm: Tensor | None = None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Spec, Spec, Spec]:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2), updating param, exp_avg and exp_avg_sq in place.

    p -= lr wd p;  m += (1 - b1)(g - m);  v = b2 v + (1 - b2) g^2
    p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
    grad_scale, a float32 scalar, multiplies the gradient first: a clip folded in. lr and step are host scalars. Where
    `norm`, a scalar, is not finite, nothing changes.
    """
    require(param.shape == grad.shape == exp_avg.shape, f"adamw_update: {param} {grad}")
    return param.like(), exp_avg.like(), exp_avg_sq.like()


@op(cost=lambda node: 16 * node.inputs[0].numel)
def stochastic_round(x: Tensor, step: Tensor, seed: Tensor, *, site: int) -> Spec:
    """y = the bfloat16 below |x| or above it, the nearer one the more often: the mean of y is x. x float32.

    The 16 bits that bfloat16 cuts off are added to 16 random ones; a carry moves the magnitude up. Element i takes half
    i % 2 (0: the lower) of word i // 2 % 4 of Philox4x32-10 with the key (seed low, seed high) and the counter
    (i // 8, site, step, 2^32 - 1): a micro-batch's number stands last in `keep_mask`'s counters. NaN stays NaN. step
    and seed are host scalars.
    """
    require(x.dtype == "float32", f"stochastic_round: x is {x.dtype}")
    return x.like(dtype="bfloat16")


@op(cost=lambda node: 2 * node.inputs[0].numel)
def dequantize_blocks(codes: Tensor, absmax: Tensor, *, signed: bool) -> Spec:
    """y = levels[code] * absmax of its block of 256 values, float32       codes uint8, absmax float32 [numel / 256]"""
    require(codes.dtype == "uint8" and codes.numel == BLOCK * absmax.numel, f"dequantize_blocks: {codes} {absmax}")
    return codes.like(dtype="float32")


@op(cost=lambda node: 16 * node.inputs[0].numel)
def quantize_blocks(x: Tensor, *, signed: bool) -> tuple[Spec, Spec]:
    """The level nearest to |x| (1 / absmax), absmax the largest |x| of its block of 256 values; of two, the lower one.

    Block-wise dynamic quantisation (Dettmers et al. 2022, section 2; bitsandbytes). Unsigned, a value above zero takes
    the lowest level above zero at least: a second moment of zero under a first one that is not would make a step of
    m / eps. The product with the reciprocal is by definition: a division would cost the kernel more than its loads.
    """
    require(x.dtype == "float32" and x.numel % BLOCK == 0, f"quantize_blocks: {x}")
    return x.like(dtype="uint8"), Spec((x.numel // BLOCK,), "float32")


def magnitudes(*, signed: bool) -> tuple[float, ...]:
    """0, the middles of each decade's equal parts (1, 2, 4, ... 64 parts of the decades from 1e-6 to 1; twice as many
    where there is no sign), and 1: the dynamic data type (Dettmers 2016, section 2.4; create_dynamic_map there).

    Unsigned, code c has magnitude c of 256; signed, code 127 + k has magnitude k of 129, and code 127 - k is minus that
    (1 has no opposite). Rounded to float32.
    """
    found = [0.0]
    for decade in range(7):
        parts = 2**decade * (1 if signed else 2)
        found += [10.0 ** (decade - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    return tuple(array("f", [*found, 1.0]))


def middles(*, signed: bool) -> tuple[float, ...]:
    """Half way between each magnitude and the next, in float32: a value's level is the number of them below it."""
    levels = magnitudes(signed=signed)
    return tuple(array("f", [(low + high) / 2 for low, high in pairwise(levels)]))


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """An `adamw_bucket`'s inputs (tensors of a graph, or arrays) by what they are: lists in the parameters' order."""

    params: tuple[Any, ...]
    grads: tuple[Any, ...]
    exp_avgs: tuple[Any, ...]
    exp_avg_sqs: tuple[Any, ...]
    exp_avg_absmaxes: tuple[Any, ...] = ()
    exp_avg_sq_absmaxes: tuple[Any, ...] = ()
    narrows: tuple[Any, ...] = ()
    scalars: tuple[Any, ...] = ()


LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes", "narrows")


def bucket_lists(*, eight_bit: bool, narrow: str) -> tuple[str, ...]:
    """Names of the lists that a bucket with these attributes is given, in order."""
    absent = {*(() if eight_bit else LISTS[4:6]), *(() if narrow else LISTS[6:])}
    return tuple(name for name in LISTS if name not in absent)


def split_bucket(inputs: tuple, sites: tuple[int, ...], *, eight_bit: bool, narrow: str) -> Bucket:
    """The inputs of an `adamw_bucket` of these attributes, apart."""
    names, count = bucket_lists(eight_bit=eight_bit, narrow=narrow), len(sites)
    lists = {name: tuple(inputs[at * count : (at + 1) * count]) for at, name in enumerate(names)}
    return Bucket(**lists, scalars=tuple(inputs[len(names) * count :]))


def _updated(node: Node) -> Pairs:
    """Every list but the gradients comes back in its own buffers."""
    count = len(node.attrs["sites"])
    names = bucket_lists(eight_bit=node.attrs["eight_bit"], narrow=node.attrs["narrow"])
    taken = [at * count + index for at, name in enumerate(names) if name != "grads" for index in range(count)]
    return tuple(enumerate(taken))


@op(
    donates=_updated,
    cost=lambda node: 12 * sum(t.numel for t in node.inputs[: len(node.attrs["sites"])]),
)
def adamw_bucket(
    *tensors: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    sites: tuple[int, ...],
    eight_bit: bool = False,
    narrow: str = "",
    stochastic: tuple[bool, bool] = (False, False),
) -> tuple[Spec, ...]:
    """`adamw_step` of n parameters of one dtype at once; sites [n] are their numbers among all that are trained.

    Inputs: n params, n grads, n exp_avg, n exp_avg_sq; with `eight_bit` n absmax of each of the two; with `narrow`, a
    dtype, n arrays of it that become the rounding of the new params; then lr, step and, or None, seed, grad_scale and
    norm. Outputs: the same lists but for the gradients, each array in its own buffer.
    """
    bucket = split_bucket(tensors, sites, eight_bit=eight_bit, narrow=narrow)
    require(len(bucket.scalars) == 5, f"adamw_bucket: {len(tensors)} inputs for {len(sites)} parameters")
    for lists in (bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs, *([bucket.narrows] if narrow else [])):
        require(all(a.shape == b.shape for a, b in zip(bucket.params, lists, strict=True)), "adamw_bucket: shapes")
    for each in (bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs, bucket.narrows):
        require(len({tensor.dtype for tensor in each}) <= 1, "adamw_bucket: a list of several dtypes")
    require(
        all(t.numel * BLOCK == p.numel for t, p in zip(bucket.exp_avg_absmaxes, bucket.params, strict=False)),
        "adamw_bucket: absmax does not fit",
    )
    require(not any(stochastic) or bucket.scalars[2] is not None, "adamw_bucket: stochastic rounding needs a seed")
    names = [name for name in bucket_lists(eight_bit=eight_bit, narrow=narrow) if name != "grads"]
    return tuple(tensor.like() for name in names for tensor in getattr(bucket, name))


@adamw_bucket.decompose
def _(*tensors, sites, eight_bit, narrow, **attrs):
    bucket = split_bucket(tensors, sites, eight_bit=eight_bit, narrow=narrow)
    lr, step, seed, grad_scale, norm = bucket.scalars
    made = [
        adamw_step(
            bucket.params[n],
            bucket.grads[n],
            bucket.exp_avgs[n],
            bucket.exp_avg_sqs[n],
            (bucket.exp_avg_absmaxes[n], bucket.exp_avg_sq_absmaxes[n]) if eight_bit else None,
            lr,
            step,
            seed,
            grad_scale,
            norm,
            site=site,
            narrow=narrow,
            **attrs,
        )
        for n, site in enumerate(sites)
    ]
    return tuple(tensor for each in zip(*made, strict=True) for tensor in each)


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    absmax: tuple[Tensor, Tensor] | None,
    lr: Tensor,
    step: Tensor,
    seed: Tensor | None,
    grad_scale: Tensor | None,
    norm: Tensor | None = None,
    *,
    site: int,
    narrow: str = "",
    stochastic: tuple[bool, bool] = (False, False),
    **attrs: Any,
) -> tuple[Tensor, ...]:
    """One parameter's step from its stored state to its stored state, as nodes around `adamw_update`.

    That is computed in the parameter's dtype if the moments have it too, else in float32. `stochastic` says whether
    (param, exp_avg_sq) are rounded to bfloat16 by chance, at sites 2 site and 2 site + 1; exp_avg is rounded to the
    nearest. Gives param, exp_avg, exp_avg_sq, with `absmax` both of it, with `narrow` the new parameter in that dtype.
    Rounding what a step without a finite norm left as it was gives the same number; quantising it may not.
    """
    plain = absmax is None and not any(stochastic) and param.dtype == exp_avg.dtype == exp_avg_sq.dtype
    work = param.dtype if plain else "float32"
    if absmax is None:
        moments = cast(exp_avg, work), cast(exp_avg_sq, work)
    else:
        moments = (
            dequantize_blocks(exp_avg, absmax[0], signed=True),
            dequantize_blocks(exp_avg_sq, absmax[1], signed=False),
        )
    p, m, v = adamw_update(cast(param, work), cast(grad, work), *moments, lr, step, grad_scale, norm, **attrs)
    new = stochastic_round(p, step, seed, site=2 * site) if stochastic[0] else cast(p, param.dtype)
    last = (cast(p, narrow),) if narrow else ()
    if absmax is not None:
        first, first_absmax = quantize_blocks(m, signed=True)
        second, second_absmax = quantize_blocks(v, signed=False)
        coded = (first, exp_avg), (second, exp_avg_sq), (first_absmax, absmax[0]), (second_absmax, absmax[1])
        return new, *(made if norm is None else keep(made, old, norm) for made, old in coded), *last
    if stochastic[1]:
        second = stochastic_round(v, step, seed, site=2 * site + 1)
    else:
        second = cast(v, exp_avg_sq.dtype)
    return new, cast(m, exp_avg.dtype), second, *last
