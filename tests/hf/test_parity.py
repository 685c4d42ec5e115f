"""`smedjan.parity`: every case equal on the exact backend, within the bound on fast ones, and red for a wrong weight.
Issue 3, Shows: bit equality against `transformers`' own output; "mutations make the parity test fail"."""

from __future__ import annotations

import numpy as np
import pytest

import smedjan
import smedjan.hf.parity as module
from smedjan.checkpoint.dtype import to_float32
from smedjan.checkpoint.raw import RawTensor

MODES, PADDINGS, ATTENTIONS = ("logits", "gradients", "decode"), ("none", "left", "right"), ("sdpa", "eager")


def test_equal_on_the_exact_backend(model_directory):
    """36 cases: both attentions, dtypes, three paddings; logits, every gradient, cached decode. Not one bit off."""
    seen = []
    report = smedjan.parity(model_directory(), backend="torch_reference", on_case=seen.append)
    wanted = {(a, d, m, p) for a in ATTENTIONS for d in ("float32", "bfloat16") for m in MODES for p in PADDINGS}
    assert {(case.attention, case.dtype, case.mode, case.padding) for case in report.cases} == wanted
    assert len(report.cases) == len(wanted)
    assert [case.name for case in report.cases if not case.equal] == []
    assert all(case.max_abs == 0 and case.max_ulp == 0 and case.bound == 0 for case in report.cases)
    assert report.ok
    assert report.exact
    assert tuple(seen) == report.cases
    assert {"transformers", "torch"} <= set(report.versions)


@pytest.mark.parametrize("backend", ["cpu_native", "mlx_metal"])
def test_within_the_bound_on_a_fast_backend(model_directory, backend):
    report = smedjan.parity(model_directory(), attention=["sdpa"], dtypes=["float32"], backend=backend)
    assert not report.exact
    assert len(report.cases) == 9
    off = [f"{case.name}: {case.error:.3e} > {case.bound:.3e}" for case in report.cases if not case.holds]
    assert off == []
    assert report.ok
    assert all(0 < case.bound < 1e-3 for case in report.cases if not case.equal), "the bound says something"


def corrupt(monkeypatch, name, relative):
    """One element of a weight of ours is off; transformers reads the directory as it is."""
    honest = module.open_session

    def open_session(files, backend, **settings):
        session = honest(files, backend, **settings)
        raw = backend.to_raw(session.parameters[name])
        assert raw.dtype == "float32"
        values = to_float32(raw).copy()
        values[np.abs(values).argmax()] *= np.float32(1 + relative)
        session.parameters[name] = backend.from_raw(
            RawTensor(dtype=raw.dtype, shape=raw.shape, data=memoryview(values).cast("B"))
        )
        return session

    monkeypatch.setattr(module, "open_session", open_session)


@pytest.mark.parametrize(
    ("backend", "relative"), [("torch_reference", 1e-6), ("cpu_native", 1e-2), ("mlx_metal", 1e-2)]
)
def test_a_corrupted_weight(model_directory, monkeypatch, backend, relative):
    """One element, by a millionth where bits count and by a hundredth where a bound does: no mode of any padding holds
    in all of its cases."""
    corrupt(monkeypatch, "model.layers.0.mlp.down_proj.weight", relative)
    report = smedjan.parity(model_directory(), attention=["sdpa"], dtypes=["float32"], backend=backend)
    assert not report.ok
    assert {case.mode for case in report.cases if not case.holds} == set(MODES)


def test_the_seed_draws_the_rows(model_directory, monkeypatch):
    """Other rows, equal as well; a corrupted weight gives other distances on them."""
    directory = model_directory()
    settings = {"attention": ["sdpa"], "dtypes": ["float32"]}
    assert smedjan.parity(directory, seed=7, **settings).ok
    corrupt(monkeypatch, "model.norm.weight", 1e-3)
    reports = [smedjan.parity(directory, seed=seed, **settings) for seed in (7, 8)]
    assert reports[0].cases[0].max_abs != reports[1].cases[0].max_abs


def tamper(monkeypatch, mode, name, change):
    """One result of ours is changed, behind the programs."""
    honest = module._ours

    def ours(session, batch):
        made = honest(session, batch)
        made[mode][name] = change(made[mode][name])
        return made

    monkeypatch.setattr(module, "_ours", ours)


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native"])
def test_a_nan_anywhere_is_out_of_bound(model_directory, monkeypatch, backend):
    """In the last tensor of many too, where a comparison with NaN could be taken for one that holds."""

    def poison(values):
        values = values.copy()
        values.flat[-1] = np.nan
        return values

    tamper(monkeypatch, "gradients", "model.norm.weight", poison)
    report = smedjan.parity(model_directory(), attention=["sdpa"], dtypes=["float32"], backend=backend)
    assert {case.mode for case in report.cases if not case.holds} == {"gradients"}
    assert not report.ok


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native", "mlx_metal"])
def test_a_wrong_loss_is_out_of_bound(model_directory, monkeypatch, backend):
    """The gradients are made apart from it on a fast backend: a loss that is off by a thousandth shows by itself."""
    tamper(monkeypatch, "gradients", "loss", lambda loss: loss * np.float32(1.001))
    report = smedjan.parity(model_directory(), attention=["sdpa"], dtypes=["float32"], backend=backend)
    assert [case.mode for case in report.cases if not case.holds] == ["gradients"] * 3
