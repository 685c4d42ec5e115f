"""The header says what transformers, peft and the plan say of the run; the meter's figures are those of its clock."""

from __future__ import annotations

import json
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import smedjan
from smedjan.cli.progress import Bar
from smedjan.train import meter as meter_module
from smedjan.train.header import lines
from smedjan.train.meter import WINDOW, Meter
from smedjan.train.parts import Finetune
from smedjan.train.plan import plan


def header_of(run_dir):
    first = json.loads((run_dir / "smedjan" / "log.jsonl").read_text().splitlines()[0])
    assert set(first) == {"step", "header"}
    return first["header"]


@pytest.fixture
def lora(configure):
    flags = {"method": "lora", "lora__rank": 4, "lora__targets": "q_proj,v_proj", "train__epochs": 1.5}
    return configure(**flags, train__batch_size=3, train__grad_accum=2)


def test_the_header_of_a_run(lora, tiny):
    seen = []
    run = smedjan.finetune(lora, on_step=seen.append)
    header = header_of(run.run_dir)
    assert seen[0] == {"step": 0, "header": header}
    peer = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    trained, every = peer.get_nb_trainable_parameters()
    assert header["model"]["parameters"] == every - trained
    assert header["trained"] == {"method": "lora", "parameters": trained, "share": trained / every}
    assert header["lora"]["targets"] == ["q_proj", "v_proj"]
    counts = header["rows"]
    assert {name: counts[name] for name in run.rows} == run.rows
    assert (counts["trained_share"], counts["unstopped"]) == (run.trained_share, run.unstopped)
    steps = header["steps"]
    assert steps["total"] == run.steps == 10  # 1.5 epochs of 40 rows, six a step
    assert steps["epochs"] * steps["rows_per_epoch"] == steps["total"] * steps["batch_size"] * steps["grad_accum"]
    events = [event for event in seen if "loss" in event]
    # Exact over whole epochs; the half one more has its rows by chance
    assert sum(event["tokens"] for event in events) == pytest.approx(steps["tokens_per_step"] * 10, rel=0.1)
    assert (header["backend"], header["exact"], header["plan_hash"]) == (run.backend, run.exact, run.plan_hash)
    assert header["memory"]["planned_bytes"] == plan(lora).planned_bytes
    assert 0 < header["memory"]["baseline_bytes"] <= events[0]["peak_bytes"]
    assert header["versions"]["torch"] == torch.__version__
    assert header["config_hash"] == lora.config_hash()
    shown = dict(lines(header))
    assert shown["rows"].startswith("40 kept;")
    assert shown["steps"].startswith("10 = 1.5 epochs x 40 rows / (3 x 2); about ")
    assert "rank 4" in shown["trained"]


def test_a_resumed_run_says_where_it_goes_on(configure):
    from dataclasses import replace

    config = configure(train__steps=3, train__save_every=1)
    smedjan.finetune(config)
    seen = []
    smedjan.finetune(replace(config, resume=True), on_step=seen.append)
    assert [(event["step"], event["header"]["steps"]["done"]) for event in seen] == [(3, 3)]
    assert "3 of them done" in dict(lines(seen[0]["header"]))["steps"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_flops_are_those_that_torch_counts(configure, tiny, method):
    """Products of matrices, to the last one: those of transformers' forward and backward pass, or of peft's."""
    parts = Finetune(configure(method=method))
    trainer = parts.trainer()
    [batch] = parts.steps.batches_for_step(0)
    trainer.session.micro(batch, trainer.names, num_items=1.0)
    (program,) = trainer.session.programs.values()
    products = sum(call.node.op.cost(call.node).flops for call in program.calls if "linear" in call.node.op.name)
    assert products < trainer.session.flops == program.cost.flops < 1.1 * products
    peer = AutoModelForCausalLM.from_pretrained(tiny)
    if method == "lora":
        peer = get_peft_model(peer, LoraConfig(r=16, target_modules=list(parts.lora.targets)))
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    with FlopCounterMode(display=False) as counter:
        peer(input_ids=ids, attention_mask=mask).logits.sum().backward()
    assert products == counter.get_total_flops()


def test_mfu_is_flops_over_time_and_peak(configure, monkeypatch):
    parts = Finetune(configure())
    trainer = parts.trainer()
    monkeypatch.setattr(type(parts.backend), "peak_flops", lambda self, dtype: 1e9)
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: next(clock))
    meter = Meter(parts.backend, "float32")
    meter.start(trainer.session)
    batches = parts.steps.batches_for_step(0)
    trainer.step(batches, number=1, lr=1e-3)
    micro, update = trainer.session.flops - trainer.update.cost.flops, trainer.update.cost.flops
    (program,) = trainer.session.programs.values()
    assert micro == program.cost.flops
    made = meter.stop(trainer.session, tokens=50, left=7)
    assert made == {"tokens_per_s": 25.0, "mfu": (micro + update) / 2.0 / 1e9, "eta_s": 14.0}


class Idle:
    """A session that computes nothing."""

    flops = 0


def test_the_time_left_is_by_the_last_steps_and_what_is_between_them(configure, monkeypatch):
    """A slow first step is forgotten, an evaluation after each step is not."""
    parts, now = Finetune(configure()), [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    meter = Meter(parts.backend, "float32")
    for step in range(WINDOW + 2):
        meter.start(Idle())
        now[0] += 1000.0 if step == 0 else 1.0
        made = meter.stop(Idle(), tokens=10, left=100)
        now[0] += 2.0
    assert made["eta_s"] == pytest.approx(300.0)
    assert made["tokens_per_s"] == 10.0
    assert made["mfu"] == 0.0


def test_a_step_above_the_measured_peak_is_the_peak(configure, monkeypatch):
    """The machine was busy when its peak was measured, and is no longer."""
    parts, now, session = Finetune(configure()), [0.0], Idle()
    monkeypatch.setattr(type(parts.backend), "peak_flops", lambda self, dtype: 100.0)
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    meter, found = Meter(parts.backend, "float32"), []
    for flops in (50, 200, 50):
        meter.start(session)
        now[0] += 1.0
        session.flops += flops
        found.append(meter.stop(session, tokens=1, left=0)["mfu"])
    assert found == [0.5, 1.0, 0.25]


def test_no_peak_is_no_mfu(configure, monkeypatch):
    parts = Finetune(configure())
    monkeypatch.setattr(type(parts.backend), "peak_flops", lambda self, dtype: None)
    meter = Meter(parts.backend, "float32")
    meter.start(Idle())
    assert meter.stop(Idle(), tokens=1, left=0)["mfu"] is None


def test_the_peak_is_measured_once(configure, monkeypatch):
    """And is no less than what one product of middling size reaches, timed here."""
    backend = Finetune(configure()).backend
    peak = backend.peak_flops("float32")
    assert backend.peak_flops("float32") == peak
    x = torch.randn(512, 512)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    # Another process may have the cores at either time: an order of magnitude is what a shared machine allows
    assert peak > 0.1 * 2 * 512**3 / min(seconds)


def test_a_clock_that_goes_backwards_or_stands_still(configure, monkeypatch, read_log, capsys):
    """The wall clock is set back by a day before every look; the steady one is too coarse to see a step. No figure is
    negative, and nothing divides by zero."""
    day, looked = 86_400.0, [0]
    real = time.time

    def back() -> float:
        looked[0] += 1
        return real() - day * looked[0]

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: 5.0)
    config = configure(train__steps=3, train__track="tensorboard", train__sample_every=2)
    with Bar(3) as bar:
        run = smedjan.finetune(config, on_step=bar)
    assert looked[0] > 3
    for event in read_log(run.run_dir).steps:
        assert event["tokens_per_s"] > 0
        assert event["eta_s"] >= 0
        assert event["mfu"] >= 0
    shown = capsys.readouterr().err
    assert "0 s left" in shown
    assert "-" not in shown.rpartition("loss")[2].split("left")[0]
