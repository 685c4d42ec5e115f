"""Which Macs hold a run: their GPUs' parts are those that have been logged."""

from __future__ import annotations

import pytest

import smedjan
from smedjan.cli.finetune import _macs
from smedjan.train.macs import GIGABYTES, macs, working_set


@pytest.mark.parametrize(
    ("gigabytes", "logged"),
    [
        (8, 5726.63e6),
        (16, 10922.67 * 2**20),
        (24, 17179.89e6),
        (32, 21845.34 * 2**20),
        (36, 28991.03e6),
        (64, 51539.61e6),
    ],
)
def test_working_sets_are_those_that_were_logged(gigabytes, logged):
    assert working_set(gigabytes) == pytest.approx(logged, abs=0.05e6), "but for pages"


@pytest.mark.parametrize("gigabytes", GIGABYTES)
def test_a_run_fits_up_to_the_last_byte(gigabytes):
    part = working_set(gigabytes)
    for needed, fits in ((part, True), (part + 1, False)):
        (mac,) = (mac for mac in macs(needed) if mac.gigabytes == gigabytes)
        assert (mac.working_set_bytes, mac.fits) == (part, fits)


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        (1, "fits into one of 8 GB or more"),
        (working_set(8) + 1, "fits into one of 16 GB or more, not into one of 8 GB, whose GPU has 5.73 GB"),
        (working_set(36), "fits into one of 36 GB or more, not into one of 24 GB, whose GPU has 17.2 GB"),
        (working_set(64) + 1, "not into one of 64 GB, whose GPU has 51.5 GB"),
    ],
)
def test_what_a_person_reads(needed, said):
    assert _macs(macs(needed)) == said


def test_the_plan_of_a_run_has_them(configure):
    made = smedjan.plan(configure(backend="mlx_metal", dry_run=True, train__steps=1))
    assert made.macs == macs(made.planned_bytes)
    assert smedjan.plan(configure(dry_run=True, train__steps=1)).macs == []
