"""Issue 7, Shows: "20-step curves (full, LoRA, QLoRA; packed)" of every family on MLX's CPU build, within the derived
bound of `torch_reference`.

Held are a run's losses, and all its gradients as one vector at each step. The truth is in float64; with u = 2^-24, and
| | of a loss or the Euclidean norm of a gradient,

    max |mlx - truth| <= 2 max |torch_reference - truth| + 2 u max |truth|        over the steps

the formula of `tests/tolerances.py`. A run feeds on its own errors, so that a whole curve is nearly a single draw, and
a lucky one of torch's would bound nothing: its maximum is over three runs, two of them of weights that are each moved
to a float32 number beside them. A product of n terms is exact for weights that are off by up to n u, and for no nearer
ones (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1): a step of one float is less than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from smedjan.runtime.select import backend
from tests.backends.family_runs import KINDS, METHODS, Curve, Runs, Truth
from tests.families import CASES
from tests.tolerances import UNIT_ROUNDOFF


def rounds() -> Iterator[Any]:
    """In every run of the tests all methods in one run of each family, packed. Each by itself is slow."""
    for family in CASES:
        yield pytest.param(family, "mixed", "packed")
        for method in METHODS:
            for kind in KINDS:
                yield pytest.param(family, method, kind, marks=pytest.mark.slow)


def off(curve: Curve, truth: Curve) -> np.ndarray:
    """[2] the most by which losses and gradients are away."""
    gradients = (curve.gradients - truth.gradients).norm(dim=1)
    return np.array([np.abs(curve.losses - truth.losses).max(), float(gradients.max())])


def truth_and_bound(family: str, method: str, kind: str) -> tuple[Curve, np.ndarray]:
    truth = Runs(family, method, kind, Truth()).curve()
    plain = Runs(family, method, kind, backend("torch_reference"))
    spread = np.max([off(plain.curve(nudge=seed), truth) for seed in (0, 1, 1001)], axis=0)
    size = np.array([np.abs(truth.losses).max(), float(truth.gradients.norm(dim=1).max())])
    return truth, 2 * spread + 2 * UNIT_ROUNDOFF[torch.float32] * size


@pytest.mark.parametrize(("family", "method", "kind"), rounds())
def test_twenty_steps(family: str, method: str, kind: str) -> None:
    truth, most = truth_and_bound(family, method, kind)
    assert truth.losses[-1] < truth.losses[0] - 1e4 * most[0], "it learns, and by far more than the bound"
    found = off(Runs(family, method, kind, backend("mlx_metal")).curve(), truth)
    assert (found <= most).all(), f"losses and gradients are {found} away, the bounds are {most}"


@pytest.mark.parametrize("method", ["mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS)])
def test_a_little_error_is_out_of_the_bound(method: str) -> None:
    """A norm's epsilon that is 1e-5 off; documents that see each other."""
    truth, most = truth_and_bound("llama", method, "packed")
    runs = Runs("llama", method, "packed", backend("mlx_metal"))
    norm = runs.session.config.norm
    runs.session.config = replace(runs.session.config, norm=replace(norm, eps=norm.eps + 1e-5))
    assert (off(runs.curve(), truth) > most).all()
    assert (off(Runs("llama", method, "causal", backend("mlx_metal")).curve(), truth) > 1e3 * most).all()
