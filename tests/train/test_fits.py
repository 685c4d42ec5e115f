"""The plan names the cheapest change that makes a run fit, and the longest row: both are planned again, and do fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import smedjan
from smedjan.backends.base import Backend
from smedjan.cli.app import run
from smedjan.errors import BackendError
from smedjan.optim import base
from smedjan.train import fits
from smedjan.train.fits import Advice, advice, longest_row, planned, warning, with_flags
from smedjan.train.parts import Finetune


def parts_of(configure, **flags):
    return Finetune(configure(**{"train__batch_size": 8, "backend": "cpu_native", **flags}))


def again(parts: Finetune, advised: Advice) -> int:
    """What is planned of the run with those flags, which is made anew from its config."""
    return planned(Finetune(with_flags(parts.config, advised.flags)))


def changed(parts: Finetune, **flags) -> int:
    return planned(Finetune(with_flags(parts.config, {name.replace("__", "."): x for name, x in flags.items()})))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("size", [4, 2, 1])
def test_smaller_micro_batches_come_first(configure, method, size):
    """The largest that fits, as many more of them: a step has the same rows."""
    parts = parts_of(configure, method=method, train__grad_accum=3)
    available = changed(parts, train__batch_size=size, train__grad_accum=24 // size)
    found = advice(parts, available)
    assert found.flags == {"train.batch-size": size, "train.grad-accum": 24 // size}
    assert again(parts, found) == found.planned_bytes <= available < planned(parts)


def test_then_8_bit_state(configure, monkeypatch):
    monkeypatch.setattr(base, "EIGHT_BIT_FROM", 256)
    parts = parts_of(configure, method="full", backend="torch_reference")
    available = changed(parts, train__batch_size=1, train__grad_accum=8) - 1
    found = advice(parts, available)
    assert found.flags["optim.state"] == "8bit"
    assert found.flags.keys() <= {"optim.state", "train.batch-size", "train.grad-accum"}
    assert again(parts, found) == found.planned_bytes <= available


def of_changes(needs):
    """Bytes of a run by what it changes: `needs` {(state, method, bits): bytes}; each row of a batch takes one more."""

    def need(parts: Finetune, seq: int | None) -> int:
        config = parts.config
        key = (config.optim.state, config.method, config.lora.bits)
        tokens = parts.max_length if seq is None else seq
        return needs.get(key, needs[None]) + config.train.batch_size + tokens * needs.get("token", 0)

    return need


CASES = {
    "full, 8-bit state": ("full", {("8bit", "full", None): 10}, {"optim.state": "8bit"}),
    "full, adapters": ("full", {("same", "lora", None): 10}, {"method": "lora"}),
    "full, 8-bit base": ("full", {("same", "qlora", 8): 10}, {"method": "qlora", "lora.bits": 8}),
    "full, 4-bit base": ("full", {("same", "qlora", 4): 10}, {"method": "qlora", "lora.bits": 4}),
    "lora, 8-bit base": ("lora", {("same", "qlora", 8): 10}, {"method": "qlora", "lora.bits": 8}),
    "lora, 4-bit base": ("lora", {("same", "qlora", 4): 10}, {"method": "qlora", "lora.bits": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_each_change_is_chosen_where_it_alone_helps(configure, name):
    """With as large a micro-batch as fits beside it: 4 of 8 rows."""
    method, needs, flags = CASES[name]
    parts = parts_of(configure, method=method)
    found = advice(parts, 14, of_changes({None: 1000, **needs}))
    assert found == Advice(flags={**flags, "train.batch-size": 4, "train.grad-accum": 2}, planned_bytes=14)


@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("full", [{"optim.state": "8bit"}, {"method": "lora"}, {"method": "qlora", "lora.bits": 8}]),
        ("lora", [{"method": "qlora", "lora.bits": 8}, {"method": "qlora", "lora.bits": 4}]),
    ],
)
def test_the_cheaper_of_two_that_help_is_chosen(configure, method, order):
    parts = parts_of(configure, method=method, train__batch_size=1)
    for cheaper in range(len(order)):
        helped = [with_flags(parts.config, flags) for flags in order[cheaper:]]
        needs = {(config.optim.state, config.method, config.lora.bits): 10 for config in helped}
        assert advice(parts, 20, of_changes({None: 1000, **needs})).flags == order[cheaper]


def test_what_the_runs_other_flags_refuse_is_not_advised(configure):
    """Adapters have nothing to freeze."""
    parts = parts_of(configure, method="full", train__freeze="embed_tokens")
    helped = {("same", "lora", None): 10, ("same", "qlora", 8): 10, ("same", "qlora", 4): 10}
    assert advice(parts, 20, of_changes({None: 1000, **helped})) is None


def test_shorter_rows_come_last(configure, write_rows):
    """One row at a time, cut to what fits: the run is planned again with its rows cut."""
    rows = write_rows([{"text": "a" * (40 + i)} for i in range(20)], "long.jsonl")
    parts = parts_of(configure, method="qlora", lora__bits=4, train__max_length=64, data=str(rows))
    one = parts.changed(with_flags(parts.config, {"train.batch-size": 1, "train.grad-accum": 8}))
    available = planned(one, 32)
    assert available < planned(one)
    found = advice(parts, available)
    assert found.flags == {
        **{"train.batch-size": 1, "train.grad-accum": 8},
        **{"train.max-length": 32, "train.too-long": "truncate"},
    }
    assert again(parts, found) <= found.planned_bytes <= available


def test_nothing_helps(configure):
    assert advice(parts_of(configure, method="lora"), 1000) is None


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native"])
@pytest.mark.parametrize("tokens", [16, 32, 48])
def test_the_longest_row_fits_and_the_next_does_not(configure, backend, tokens):
    parts = parts_of(configure, backend=backend, method="lora")
    available = planned(parts, tokens)
    assert available < planned(parts, tokens + 16)
    assert longest_row(parts, available) == tokens


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("context", [16, 64, 1000, 131072])
def test_the_search_finds_the_last_that_fits(configure, monkeypatch, power, context):
    """Whatever the curve; up to the context, which need be no multiple; in few plans."""
    parts = parts_of(configure)
    parts.files = replace(parts.files, config=replace(parts.files.config, max_position_embeddings=context))
    asked = []

    def need(_, seq):
        asked.append(seq)
        return seq**power

    for most in {15, 16, 17, 31, 32, context // 2, context - 1, context, context + 1}:
        asked.clear()
        found = longest_row(parts, most**power, need)
        assert found == (context if most >= context else most // 16 * 16)
        assert len(asked) <= 2 + fits.GUESSES + (context // 16).bit_length()


def test_the_plan_says_all_of_it(configure, capsys):
    """In a run that fits nowhere near, and with its own advice taken."""
    config = configure(train__batch_size=8, method="lora", backend="cpu_native", dry_run=True)
    roomy = smedjan.plan(config)
    assert (roomy.fits, roomy.advice) == (True, None)
    assert roomy.longest_row == 64
    assert roomy.memory_available > roomy.planned_bytes
    smaller = planned(Finetune(with_flags(config, {"train.batch-size": 2, "train.grad-accum": 4})))
    tight = smedjan.plan(with_flags(config, {"train.memory": f"{smaller}"}))
    assert (tight.fits, tight.memory_available, tight.step_seconds) == (False, smaller, None)
    assert tight.advice.startswith("--train.batch-size 2 --train.grad-accum 4: planned ")
    assert tight.longest_row < max(len(example) for example in Finetune(config).dataset.examples)
    taken = smedjan.plan(
        with_flags(config, {"train.memory": f"{smaller}", "train.batch-size": 2, "train.grad-accum": 4})
    )
    assert (taken.fits, taken.planned_bytes) == (True, smaller)
    words = ["--model", config.model, "--data", str(config.data), "--train.memory", f"{smaller}", "--dry-run"]
    assert run(["finetune", *words, "--train.batch-size", "8", "--backend", "cpu_native"]) == 0
    shown = capsys.readouterr().out
    assert ": does not fit" in shown
    assert tight.advice in shown


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("backend", ["cuda_triton", "cpu_native", "torch_reference"])
def test_a_run_fits_where_its_own_rows_do(configure, backend, share):
    """Also where a backend recomputes to make it fit; and what is advised where it does not is planned to fit."""
    roomy = smedjan.plan(configure(train__batch_size=8, method="full", backend=backend, dry_run=True))
    config = configure(train__batch_size=8, method="full", backend=backend, dry_run=True)
    memory = {"train.memory": f"{int(share * roomy.planned_bytes)}"}
    tight = smedjan.plan(with_flags(config, memory))
    assert tight.fits == (tight.longest_row >= tight.batch["tokens"])
    assert tight.fits or share < 1.0
    if tight.advice is not None:
        given = tight.advice.partition(":")[0].split()
        advised = {name.removeprefix("--"): value for name, value in zip(given[::2], given[1::2], strict=True)}
        assert smedjan.plan(with_flags(config, {**memory, **advised})).fits


def test_a_run_that_may_not_fit_is_warned_of_and_trains(configure, monkeypatch):
    monkeypatch.setattr(Backend, "memory_available", lambda self: 1_000_000)
    said, config = [], configure(train__steps=1, backend="cpu_native")
    made = smedjan.finetune(config, say=said.append)
    assert made.steps == 1
    (line,) = [line for line in said if "available" in line]
    assert "1 MB available" in line
    assert "\n" not in line
    header = json.loads((made.run_dir / "smedjan" / "log.jsonl").read_text().splitlines()[0])["header"]
    assert header["memory"]["available_bytes"] == 1_000_000


def test_memory_that_was_given_is_held_or_refused(configure):
    """On cpu_native, which keeps less for it; what it cannot do is one error, with a way out."""
    config = configure(train__steps=1, backend="cpu_native", method="full")
    needed = smedjan.plan(replace(config, dry_run=True)).planned_bytes
    less = with_flags(config, {"train.memory": f"{needed - 1}"})
    assert smedjan.plan(replace(less, dry_run=True)).planned_bytes < needed
    with pytest.raises(BackendError, match=r"a step needs .*recomputed, of 0; train fewer or shorter rows"):
        smedjan.finetune(with_flags(config, {"train.memory": "1MB"}))


def test_no_warning_where_it_fits_or_nobody_knows():
    assert warning(5, 5) is None
    assert warning(5, None) is None
    assert warning(6, 5) is not None
