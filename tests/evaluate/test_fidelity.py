# ruff: noqa: F811  (fixtures)
"""The report of `merge`: its numbers are torch's, a faithful merge is shown to be one, and so is the disaster of issue
6, "merged QLoRA worse than unmerged"."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import smedjan
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.cli import app
from smedjan.data.formats import Source
from smedjan.data.mask import Example
from smedjan.errors import SmedjanError
from smedjan.evaluate import fidelity
from smedjan.hf.load import open_model
from smedjan.hf.trained import trained
from smedjan.train.parts import Finetune
from tests.train.conftest import configure, pairs, tiny, write_rows  # noqa: F401

QLORA = {"method": "qlora", "lora__rank": 4, "train__steps": 15, "train__batch_size": 8, "optim__lr": 2e-2}


def example(ids, trains=None) -> Example:
    mask = np.ones(len(ids), np.bool_) if trains is None else np.asarray(trains, np.bool_)
    return Example(input_ids=np.asarray(ids, np.int32), labels_mask=mask, source=Source(file="rows", line=1))


def test_numbers_are_torchs():
    generator = torch.Generator().manual_seed(0)
    rows = [example([1, 4, 2, 3]), example([0, 3, 4], [False, False, True])]
    before = [torch.randn(len(row), 5, generator=generator) * 3 for row in rows]
    after = [logits + 0.3 * torch.randn(logits.shape, generator=generator) for logits in before]
    made = fidelity.compare("a", "b", [x.numpy() for x in before], [x.numpy() for x in after], rows)
    one, other = torch.cat(before).double(), torch.cat(after).double()
    log, log_other = one.log_softmax(-1), other.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_other, log, log_target=True, reduction="none").sum(-1)
    assert (made.of, made.to, made.positions) == ("a", "b", 7)
    assert made.max_abs == float((one - other).abs().max())
    assert made.mean_abs == pytest.approx(float((one - other).abs().mean()), rel=1e-12)
    assert (made.kl_mean, made.kl_max) == pytest.approx((float(kl.mean()), float(kl.max())), rel=1e-10)
    assert made.top1 == float((one.argmax(-1) == other.argmax(-1)).double().mean())
    # Token t is predicted at t - 1: three of the first row, and of the second the last alone.
    places, targets = [0, 1, 2, 5], torch.tensor([4, 2, 3, 4])
    for found, logs in ((made.nll_of, log), (made.nll_to, log_other)):
        assert found == pytest.approx(float(torch.nn.functional.nll_loss(logs[places], targets)), rel=1e-12)


def test_the_same_logits_are_no_distance():
    rows = [example([1, 2, 3])]
    logits = [np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)]
    made = fidelity.compare("a", "b", logits, logits, rows)
    assert (made.max_abs, made.mean_abs, made.kl_max, made.top1) == (0.0, 0.0, 0.0, 1.0)
    assert made.nll_of == made.nll_to


def test_rows_stay_within_what_is_kept(tiny, write_rows, monkeypatch):
    files = open_model(tiny)
    prompts = fidelity.examples(files, None)
    assert len(prompts) == len(fidelity.PROMPTS)
    assert max(len(row) for row in prompts) <= files.config.max_position_embeddings
    data = write_rows([{"prompt": "hello ", "completion": "world"}] * 9, "asked.jsonl")
    monkeypatch.setattr(fidelity, "POSITIONS", 20)
    rows = fidelity.examples(files, data)
    assert sum(len(row) for row in rows) == 20
    assert 0 < rows[0].trained_tokens < len(rows[0])


def test_a_merge_of_lora_is_faithful(configure, tiny, tmp_path):
    run = smedjan.finetune(configure(**{**QLORA, "method": "lora", "train__steps": 5}))
    report = smedjan.merge(tiny, run.run_dir, tmp_path / "merged", backend="torch_reference")
    (found,) = report.comparisons
    assert (found.of, found.to, found.top1) == ("adapter beside base", "merged", 1.0)
    assert found.kl_max < 1e-6
    assert 0 < found.max_abs < 1e-3
    assert trained(open_model(tiny), run.run_dir) is None
    assert smedjan.merge(tiny, run.run_dir, tmp_path / "quiet", check=False).comparisons == ()
    with pytest.raises(SmedjanError, match="onto: the adapter does not say"):
        smedjan.merge(tiny, run.run_dir, tmp_path / "other", onto="trained")
    with pytest.raises(SmedjanError, match="storage: 'q4' is no format of weights; give nf4 or int8"):
        smedjan.merge(tiny, run.run_dir, tmp_path / "other", storage="q4")
    with pytest.raises(SmedjanError, match="onto: is 'both'; give stored or trained"):
        smedjan.merge(tiny, run.run_dir, tmp_path / "other", onto="both")
    with pytest.raises(SmedjanError, match=r"missing\.jsonl"):
        smedjan.merge(tiny, run.run_dir, tmp_path / "other", data=tmp_path / "missing.jsonl")
    assert not (tmp_path / "other").exists(), "rows are read before anything is written"


@pytest.mark.parametrize("start", ["random", "pissa"])
def test_a_merged_qlora_is_shown_to_be_worse_than_it_was(configure, pairs, tiny, tmp_path, start):
    """On the rows that it was trained on, the merged model has lost what made up for the 4 bits; `onto="trained"` keeps
    it, for PiSSA over what 4 bits left of the residual."""
    steps = {"random": 30, "pissa": 5}[start]
    config = configure(**{**QLORA, "train__steps": steps}, lora__init=start, backend="cpu_native")
    run = smedjan.finetune(config)
    asked = {"data": pairs, "backend": "torch_reference"}
    report = smedjan.merge(tiny, run.run_dir, tmp_path / "merged", **asked)
    quantised, stored = report.comparisons
    assert (quantised.of, stored.of) == ("adapter beside nf4", "adapter beside base")
    if start == "random":  # the 4 bits of a residual lose less, and too few steps were done to make up for it
        assert quantised.nll_to > quantised.nll_of
    assert stored.kl_max < 1e-6 < quantised.kl_mean / 100
    assert quantised.max_abs > 100 * stored.max_abs

    onto = smedjan.merge(tiny, run.run_dir, tmp_path / "onto", onto="trained", **asked)
    assert onto.comparisons[0].kl_max < 1e-6 < onto.comparisons[1].kl_mean / 100
    assert onto.comparisons[0].top1 == 1.0

    # What is compared is the run's own session, to the bit.
    files = open_model(tiny)
    trainer = Finetune(config).trainer()
    trainer.restore(load_checkpoint(run.run_dir).weights, trainer.optimizer_state())
    rows = fidelity.examples(files, pairs)
    again = trained(files, run.run_dir).session(trainer.session.backend)
    for ours, theirs in zip(fidelity.logits_of(again, rows), fidelity.logits_of(trainer.session, rows), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_command_says_so(configure, pairs, tiny, tmp_path, capsys):
    run = smedjan.finetune(configure(**{**QLORA, "train__steps": 2, "lora__bits": 8}))
    words = ["merge", str(tiny), str(run.run_dir), str(tmp_path / "merged"), "--backend", "cpu_native"]
    assert app.run(words) == 0
    head, names, first, second, advice = capsys.readouterr().out.splitlines()
    assert "14 modules merged" in head
    assert names.startswith("against merged")
    assert first.startswith("adapter beside int8")
    assert second.startswith("adapter beside base")
    assert "--onto trained" in advice
    words[3] = str(tmp_path / "json")
    assert app.run([*words, "--json", "--data", str(pairs), "--onto", "trained"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [each["of"] for each in made["comparisons"]] == ["adapter beside int8", "adapter beside base"]
    assert set(made["comparisons"][0]) == {
        *("of", "to", "positions", "max_abs", "mean_abs", "kl_mean", "kl_max", "top1", "nll_of", "nll_to")
    }
