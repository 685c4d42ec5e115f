"""A run on MLX in little memory: the same numbers out of less, or one error before anything is written."""

from __future__ import annotations

import mlx.core as mx
import pytest

import smedjan
from smedjan.backends.mlx_metal import MlxBackend, limits
from smedjan.errors import BackendError

RUN = {"method": "lora", "lora__rank": 4, "train__steps": 3, "train__batch_size": 2, "backend": "mlx_metal"}


def test_a_run_in_less_memory_is_the_same_run(configure, read_log):
    """Recomputation for --train.memory changes no loss and no weight; the plan says what is given up."""
    plenty = configure("plenty", **RUN)
    needed = smedjan.plan(plenty).planned_bytes
    less = configure("less", **RUN, train__memory=f"{needed - 1}")
    plan = smedjan.plan(less)
    assert plan.planned_bytes < needed
    assert plan.fits
    assert {row["what"] for row in plan.memory} == {"recompute"}
    runs = [smedjan.finetune(config) for config in (plenty, less)]
    assert runs[0].weights_sha256 == runs[1].weights_sha256
    losses = [[step["loss"] for step in read_log(run.run_dir).steps] for run in runs]
    assert losses[0] == losses[1]
    with pytest.raises(BackendError, match="a step needs") as error:
        smedjan.finetune(configure("none", **RUN, train__memory="100KB"))
    assert error.value.field == "memory"


@pytest.fixture
def as_on_metal(monkeypatch: pytest.MonkeyPatch):
    """The run is held as on a Mac of macOS 14 whose GPU holds so many bytes."""
    held: dict[str, int] = {}
    monkeypatch.setattr(MlxBackend, "holding", lambda self, planned, remedy: limits.holding(planned, remedy=remedy))
    monkeypatch.setattr(limits, "working_set", lambda: held["bytes"])
    monkeypatch.setattr(limits, "macos", lambda: (14, 5))
    return held


def test_what_the_gpu_does_not_hold_is_refused_before_anything_is_written(as_on_metal, configure):
    config = configure("refused", **RUN)
    as_on_metal["bytes"] = 100_000
    before = mx.get_memory_limit()
    with pytest.raises(BackendError, match=r"are needed, and this Mac's GPU holds 100 KB") as error:
        smedjan.finetune(config)
    assert (error.value.field, error.value.remedy) == ("memory", "--dry-run says with which flags it fits")
    assert not config.out.exists()
    assert mx.get_memory_limit() == before


def test_limits_hold_as_long_as_the_run_does(as_on_metal, configure):
    as_on_metal["bytes"] = 3 * 10**9
    before, seen = mx.get_memory_limit(), []
    smedjan.finetune(configure("held", **RUN), on_step=lambda event: seen.append(mx.get_memory_limit()))
    assert set(seen) == {3 * 10**9}
    assert mx.get_memory_limit() == before
