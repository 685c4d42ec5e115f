"""Issue 7, Shows: "20-step curves (full, LoRA, QLoRA; packed)" of every family on MLX's CPU build, within the derived
bound of `torch_reference`: a run's losses, and all its gradients as one vector at each step, by `run_bound` of
tests/tolerances.py. The truth is the same run in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from smedjan.runtime.select import backend
from tests.backends.family_runs import KINDS, METHODS, Curve, Runs, Truth
from tests.families import CASES
from tests.tolerances import run_bound, run_error

WHAT = ("losses", "gradients")


def rounds() -> Iterator[Any]:
    """In every run of the tests all methods in one run of each family, packed. Each by itself is slow."""
    for family in CASES:
        yield pytest.param(family, "mixed", "packed")
        for method in METHODS:
            for kind in KINDS:
                yield pytest.param(family, method, kind, marks=pytest.mark.slow)


def held(family: str, method: str, kind: str) -> tuple[Curve, list[float]]:
    """The true run, and how far losses and gradients of one in float32 may be from it."""
    truth = Runs(family, method, kind, Truth()).curve()
    plain = Runs(family, method, kind, backend("torch_reference"))
    runs = [plain.curve(nudge=seed) for seed in (0, 1, 1001)]
    return truth, [
        run_bound(getattr(truth, what), [getattr(run, what) for run in runs], torch.float32) for what in WHAT
    ]


def off(curve: Curve, truth: Curve) -> list[float]:
    return [run_error(getattr(curve, what), getattr(truth, what)) for what in WHAT]


@pytest.mark.parametrize(("family", "method", "kind"), rounds())
def test_twenty_steps(family: str, method: str, kind: str) -> None:
    truth, most = held(family, method, kind)
    assert truth.losses[-1] < truth.losses[0] - 1e4 * most[0], "it learns, and by far more than the bound"
    found = off(Runs(family, method, kind, backend("mlx_metal")).curve(), truth)
    for what, error, bound in zip(WHAT, found, most, strict=True):
        assert error <= bound, f"{what} are {error:.3e} away, the bound is {bound:.3e}"


@pytest.mark.parametrize("method", ["mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS)])
def test_a_little_error_is_out_of_the_bound(method: str) -> None:
    """A norm's epsilon that is 1e-5 off; documents that see each other."""
    truth, most = held("llama", method, "packed")
    runs = Runs("llama", method, "packed", backend("mlx_metal"))
    norm = runs.session.config.norm
    runs.session.config = replace(runs.session.config, norm=replace(norm, eps=norm.eps + 1e-5))
    blind = Runs("llama", method, "causal", backend("mlx_metal"))
    for error, other, bound in zip(off(runs.curve(), truth), off(blind.curve(), truth), most, strict=True):
        assert error > bound
        assert other > 1e3 * bound
