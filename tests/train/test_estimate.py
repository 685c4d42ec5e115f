"""The time of a step is that of its nodes: every one is counted once, each distinct one run once, by its own rule."""

from __future__ import annotations

import json
from collections import Counter
from itertools import count

import pytest

import smedjan
from smedjan.checkpoint.safetensors import open_file, save_file
from smedjan.optim import base as optim_base
from smedjan.train import estimate
from smedjan.train.estimate import step_time
from smedjan.train.largest import largest_form
from smedjan.train.parts import Finetune

BACKENDS = ("torch_reference", "cpu_native")


class Clock:
    """Every look is a second later: what is run between two of them takes one."""

    def __init__(self) -> None:
        self.seconds = count()

    def __call__(self) -> float:
        return float(next(self.seconds))

    @property
    def runs(self) -> int:
        return next(self.seconds) // 2


def timed(config, **options):
    parts = Finetune(config)
    outline, clock = parts.outline, Clock()
    form = largest_form(parts, outline.session.dtype)
    made = step_time(outline, form, accumulate=config.train.grad_accum, clock=clock, **options)
    return outline, form, made, clock.runs


def started(program):
    return [call for call in program.calls if program.starts(call)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_node_is_counted_once(configure, backend, method, accumulate):
    """At a second a node, an op takes as many seconds as it has nodes in all the micro-batches and the update."""
    outline, form, made, runs = timed(configure(backend=backend, method=method, train__grad_accum=accumulate))
    programs = [outline.micro(form), outline.update]
    programs += [outline.micro(form, accumulate=True)] * (accumulate - 1)
    nodes = Counter((call.node.op.name, call.label) for program in programs for call in started(program))
    lists = {"global_norm", "norm_and_clip", "adamw_bucket"}
    assert {key: made.ops[key] for key in nodes if key[0] not in lists} == {
        key: float(number) for key, number in nodes.items() if key[0] not in lists
    }
    assert all(made.ops[key] > 0 for key in nodes)
    views = {key for key in made.ops if key not in nodes}
    assert all(made.ops[key] == 0.0 for key in views)
    assert made.seconds == sum(made.ops.values())
    assert runs < sum(nodes.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_layers_of_a_kind_are_not_run_again(configure, tmp_path, tiny, backend):
    """Runs of a model of two and of four layers time the same nodes."""
    deeper = tmp_path / "deeper"
    deeper.mkdir()
    for file in tiny.iterdir():
        (deeper / file.name).write_bytes(file.read_bytes())
    config = json.loads((tiny / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    tensors = dict(open_file(tiny / "model.safetensors"))
    more = {
        name.replace(f"layers.{layer}.", f"layers.{layer + 2}."): tensor
        for layer in range(2)
        for name, tensor in tensors.items()
        if f"layers.{layer}." in name
    }
    save_file(deeper / "model.safetensors", {**tensors, **more})
    flags = {"backend": backend, "method": "lora"}
    *_, shallow, few = timed(configure(**flags))
    *_, deep, many = timed(configure(model=str(deeper), **flags))
    assert many == few
    assert deep.seconds > shallow.seconds


def test_an_update_is_timed_on_a_sample_and_its_time_goes_with_the_work(configure, monkeypatch):
    """The largest array alone is above the sample's bytes: its time is what the others say."""
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 1)
    outline, _, made, _ = timed(configure(backend="cpu_native", method="full"))
    (bucket,) = [call.node for call in outline.update.calls if call.node.op.name == "adamw_bucket"]
    smallest = min(tensor.numel for tensor in bucket.inputs[: len(outline.names)])
    whole = sum(tensor.numel for tensor in bucket.inputs[: len(outline.names)])
    assert made.ops["adamw_bucket", "native adamw"] == pytest.approx(whole / smallest)


def test_a_node_that_takes_more_than_there_is_is_not_run(configure):
    *_, made, runs = timed(configure(), most_bytes=1000)
    assert (made, runs) == (None, 0)


@pytest.mark.parametrize(
    "flags",
    [
        {"train__packing": True, "lora__dropout": 0.1, "lora__dora": True, "method": "lora"},
        {"method": "full", "dtype": "bfloat16", "optim__master": False, "optim__rounding": "stochastic"},
        {"method": "full", "optim__state": "8bit"},
        {"method": "full", "optim__name": "muon"},
        {"method": "full", "optim__name": "adafactor"},
        {"method": "qlora", "lora__bits": 8, "train__neftune": 5, "train__z_loss": 1e-4},
    ],
    ids=["packed dora", "stochastic", "8bit", "muon", "adafactor", "int8"],
)
@pytest.mark.parametrize("backend", [*BACKENDS, "mlx_metal"])
def test_every_kind_of_run_is_timed(configure, monkeypatch, backend, flags):
    """Whatever a run's nodes are, each runs alone, on valid tokens; the plan's ops add up to the step."""
    monkeypatch.setattr(optim_base, "EIGHT_BIT_FROM", 0)  # so that a tiny model has such state
    config = configure(backend=backend, train__batch_size=1, dry_run=True, **flags)
    if "optim__state" in flags:
        outline = Finetune(config).outline
        assert "uint8" in {dtype for _, dtype in outline.optimizer.state(outline.shapes).values()}
    made = smedjan.plan(config)
    assert made.step_seconds > 0
    assert made.step_seconds == pytest.approx(sum(row["seconds"] for row in made.ops))


def test_triton_without_a_gpu_has_no_time(configure):
    made = smedjan.plan(configure(backend="cuda_triton", dry_run=True))
    assert made.step_seconds is None
    assert all("seconds" not in row for row in made.ops)
