"""The one table of tolerances: how far a fast computation may be from the true value, derived, not tuned.

    error <= 2 * e_plain + 2 * u * max|reference| + a * max|reference|

error: the largest difference from `reference`, the same computation in float64. e_plain: that of the plain torch
computation in the dtype under test, which shares every unavoidable error (inputs' conditioning, roundings between ops);
two of them, since another order of a sum may be as unlucky as torch's was lucky. u: the unit roundoff of the result's
dtype, one rounding of the result, and one more because the plain error may be zero where torch happens to be exact.
a: error of the device's approximate functions where a kernel uses them and torch does not (`APPROXIMATE`); zero in
Triton's interpreter, whose functions are numpy's. FlashAttention's tests have the first two terms.

A whole model's results are held to the same formula in Euclidean norms, tensor by tensor (`assert_near`): each inherits
its error from all the layers around it, so that its largest element is a single draw, and a lucky one of the plain
computation would bound nothing.

A training run feeds on its own errors, so that a whole curve is nearly a single draw too (`run_bound`). e_plain is
therefore the largest of several plain runs: of the weights, and of weights that are each `nudged` to a float32 number
beside them. A computed product of n terms is the exact one of weights that are off by up to n u, and of no nearer ones
(Higham, "Accuracy and Stability of Numerical Algorithms", 3.1), so that a step of one float is less than what any order
of the sums does. A run that amplifies errors without bound would be held to nothing: the caller sees to it that losses
fall by far more than the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the distance between 1 and the next number: the largest relative error of rounding to nearest."""

APPROXIMATE = 2.0**-21
"""PTX ISA 8.5: relative error of ex2.approx 2^-22, rsqrt.approx 2^-22.4, div.full 2 ulp, lg2.approx 2^-22 absolute
below 2; a kernel chains at most two. Counted on a CUDA device alone."""


def error(value: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, in float64; infinite where either is NaN and the other is not."""
    assert value.shape == reference.shape, f"{list(value.shape)} is not {list(reference.shape)}"
    if value.numel() == 0:
        return 0.0
    difference = (value.double().cpu() - reference.double().cpu()).abs()
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def bound(reference: Tensor, plain: Tensor, dtype: torch.dtype, *, scale: float | None = None) -> float:
    """The bound above. `dtype` is the result's; `scale`, where cancellation is inherent, replaces max|reference|."""
    assert reference.dtype == torch.float64, "the reference is float64"
    if reference.numel() == 0:
        return 0.0
    largest = float(reference.abs().max()) if scale is None else scale
    approximate = APPROXIMATE if plain.device.type == "cuda" else 0.0
    return 2 * error(plain, reference) + (2 * UNIT_ROUNDOFF[dtype] + approximate) * largest


def assert_close(name: str, value: Tensor, reference: Tensor, plain: Tensor, *, scale: float | None = None) -> None:
    """`value` is within the bound of `reference`, to which `plain` is the plain torch computation."""
    found, most = error(value, reference), bound(reference, plain, value.dtype, scale=scale)
    assert found <= most, f"{name}: error {found:.3e} > bound {most:.3e} ({value.dtype}, {list(value.shape)})"


def assert_near(name: str, value: Tensor, reference: Tensor, plain: Tensor) -> None:
    """A whole model's result: |value - reference| <= 2 |plain - reference| + 2 u |reference|, Euclidean norms."""
    found = float((value.double() - reference).norm())
    most = 2 * float((plain.double() - reference).norm()) + 2 * UNIT_ROUNDOFF[value.dtype] * float(reference.norm())
    assert found <= most, f"{name}: error {found:.3e} > bound {most:.3e} ({value.dtype}, {list(value.shape)})"


def nudged(array: Tensor, seed: int) -> Tensor:
    """Each element is one of the two float32 numbers beside it."""
    up = torch.randint(0, 2, array.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nextafter(array, up * torch.inf)


def run_error(values: Tensor, reference: Tensor) -> float:
    """Of the values of each step, [steps] or as vectors [steps, n]: the largest Euclidean norm of a difference."""
    assert values.shape == reference.shape, f"{list(values.shape)} is not {list(reference.shape)}"
    off = (values.double() - reference).reshape(len(reference), -1).norm(dim=1)
    return float(off.nan_to_num(nan=float("inf")).max())


def run_bound(reference: Tensor, plain: Sequence[Tensor], dtype: torch.dtype) -> float:
    """2 e_plain + 2 u max |reference| over the steps; e_plain is the largest of all runs in `plain`."""
    size = run_error(reference, torch.zeros_like(reference))
    return 2 * max(run_error(run, reference) for run in plain) + 2 * UNIT_ROUNDOFF[dtype] * size
