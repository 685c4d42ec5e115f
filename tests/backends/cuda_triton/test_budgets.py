"""The budget file and its comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from smedjan.backends.cuda_triton import budgets
from smedjan.backends.cuda_triton.budgets import Budget, Resources

FOUND = Resources(
    registers=41,
    spilled=0,
    shared=512,
    instructions=200,
    wide_loads=4,
    wide_stores=2,
    products=8,
    hopper_products=4,
    local_accesses=0,
)
KEY = "norm.rms_norm_fwd | rms_norm bf16 8192 x 576 | COLS=1024 num_warps=4 | sm_90"


def breaches(found: Resources | None, *, key: str = KEY, release: str = "3.9.0") -> list[str]:
    measured = {} if found is None else {key: found}
    return budgets.breaches(measured, {KEY: Budget.of(FOUND)}, release=release, recorded_release="3.9.0")


def test_registers_have_the_slack_of_one_allocation_step():
    assert Budget.of(FOUND).registers == 48
    assert Budget.of(replace(FOUND, registers=48)).registers == 48
    assert breaches(replace(FOUND, registers=48)) == []
    assert breaches(replace(FOUND, registers=49)) == [f"{KEY}: registers 49, budget 48"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shared": 513}, "shared 513"),
        ({"wide_loads": 3}, "wide_loads 3"),
        ({"wide_stores": 0}, "wide_stores 0"),
        ({"products": 7}, "products 7"),
        ({"hopper_products": 0}, "hopper_products 0"),
    ],
)
def test_each_bound_is_held(change, text):
    (line,) = breaches(replace(FOUND, **change))
    assert text in line


def test_fewer_and_wider_is_no_breach():
    assert breaches(replace(FOUND, registers=16, shared=0, wide_loads=8, wide_stores=4)) == []


def test_what_no_code_was_read_for_is_no_breach():
    assert breaches(replace(FOUND, wide_loads=None, wide_stores=None, products=None, hopper_products=None)) == []


def test_a_spill_on_sm_90_is_a_breach_under_every_release():
    for release in ("3.9.0", "3.6.0"):
        assert f"{KEY}: spills 8 bytes a thread" in breaches(replace(FOUND, spilled=8), release=release)
        assert breaches(replace(FOUND, local_accesses=1), release=release)


def test_other_bounds_are_those_of_one_release():
    assert breaches(replace(FOUND, registers=200), release="3.6.0") == []


def test_a_build_without_a_budget_and_a_budget_without_a_build():
    assert breaches(FOUND, key="new sm_90") == ["new sm_90: no budget", f"{KEY}: a budget, but no such build"]
    assert breaches(None) == [f"{KEY}: a budget, but no such build"]


def test_written_budgets_are_read_back(tmp_path: Path):
    path = tmp_path / "budgets.json"
    budgets.write("3.9.0", {KEY: FOUND}, path)
    assert budgets.read(path) == ("3.9.0", {KEY: Budget.of(FOUND)})
    assert list(tmp_path.iterdir()) == [path]
