"""Trackers get what the log gets: TensorBoard's own reader finds it; wandb and trackio by their real API where they are
installed, else by a stand-in with its shape."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

import smedjan
from smedjan.errors import ConfigError
from smedjan.train.track import as_text, scalars


def events_of(run_dir):
    return [json.loads(line) for line in (run_dir / "smedjan" / "log.jsonl").read_text().splitlines()]


def test_tensorboard_reads_back_the_log(configure, write_rows):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    valid = write_rows([{"prompt": "hello 3 ", "completion": "world 0"}], "valid.jsonl")
    flags = {"train__steps": 4, "train__sample_every": 2, "train__eval_every": 2, "train__track": "tensorboard"}
    run = smedjan.finetune(configure(eval_data=str(valid), **flags))
    found = EventAccumulator(str(run.run_dir / "tensorboard"))
    found.Reload()
    logged = events_of(run.run_dir)
    for name in ("loss", "grad_norm", "lr", "tokens_per_s", "mfu"):
        written = [(event.step, event.value) for event in found.Scalars(f"train/{name}")]
        # A scalar of an event file is a float32
        wanted = [(event["step"], pytest.approx(event[name], rel=2**-23)) for event in logged if "loss" in event]
        assert written == wanted
    evals = [event["eval_loss"] for event in logged if "eval_loss" in event]
    assert [event.value for event in found.Scalars("eval/loss")] == pytest.approx(evals, rel=2**-23)
    samples = [event for event in logged if "samples" in event]
    texts = found.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [2, 4]
    assert texts[-1].tensor_proto.string_val[0].decode() == as_text(samples[-1]["samples"])
    (header,) = found.Tensors("run/text_summary")
    assert logged[0]["header"]["plan_hash"] in header.tensor_proto.string_val[0].decode()


def test_tensorboard_forgets_what_a_resumed_run_does_again(configure):
    from dataclasses import replace

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stop(Exception):
        pass

    def on_step(event):
        if event["step"] == 3:
            raise Stop

    config = configure(train__steps=4, train__save_every=2, train__track="tensorboard")
    with pytest.raises(Stop):
        smedjan.finetune(config, on_step=on_step)
    smedjan.finetune(replace(config, resume=True))
    found = EventAccumulator(str(config.out / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]


class Recorder:
    """A module with the calls of wandb and of trackio that are made, which notes them."""

    def __init__(self, name):
        self.calls = []
        self.module = ModuleType(name)
        run = SimpleNamespace(log=self._note("log"), finish=self._note("finish"))
        self.module.init = lambda **options: (self.calls.append(("init", (), options)), run)[1]
        self.module.log, self.module.finish = run.log, run.finish
        self.module.Table = lambda **options: ("table", options)
        self.module.Markdown = lambda text: ("markdown", text)

    def _note(self, name):
        return lambda *given, **options: self.calls.append((name, given, options))

    def named(self, name):
        return [(given, options) for called, given, options in self.calls if called == name]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_others_get_the_same(configure, monkeypatch, name):
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder.module)
    run = smedjan.finetune(configure(train__steps=2, train__sample_every=2, train__track=name))
    logged = events_of(run.run_dir)
    [(_, options)] = recorder.named("init")
    assert options["config"] == logged[0]["header"]
    assert options["resume"] == "allow"
    sent = recorder.named("log")
    steps = [event for event in logged if "loss" in event]
    numbers = [(given[0], options["step"]) for given, options in sent if "train/loss" in given[0]]
    assert numbers == [(scalars(event), event["step"]) for event in steps]
    [[kind, said]] = [given[0]["samples"] for given, _ in sent if "samples" in given[0]]
    texts = [each["text"] for each in next(event for event in logged if "samples" in event)["samples"]]
    if name == "wandb":
        assert kind == "table"
        assert [row[2] for row in said["data"]] == texts
    else:
        assert kind == "markdown"
        assert all(text in said for text in texts)
    assert len(recorder.named("finish")) == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_calls_are_those_of_the_real_package(name):
    """The stand-in above has the shape of what it stands for."""
    import inspect

    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'smedjan[{name}]'")
    module = __import__(name)
    asked = {"wandb": ("project", "id", "name", "dir", "config", "resume"), "trackio": ("project", "name", "config")}
    assert set(asked[name]) <= set(inspect.signature(module.init).parameters)
    assert module.Table if name == "wandb" else module.Markdown
    log = module.Run.log if name == "wandb" else module.log
    assert {"step"} < set(inspect.signature(log).parameters)


def test_a_failed_run_closes_its_trackers(configure, monkeypatch):
    recorder = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", recorder.module)

    def on_step(event):
        if event["step"] == 1:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        smedjan.finetune(configure(train__steps=2, train__track="wandb"), on_step=on_step)
    assert recorder.named("finish") == [((), {"exit_code": 1})]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandb", r"pip install 'smedjan\[wandb\]'"),
        ("tensorbord", "did you mean tensorboard"),
        ("mlflow", "not one of"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line_and_nothing_is_written(configure, monkeypatch, name, said):
    monkeypatch.setitem(sys.modules, name, None)  # as of a package that is not installed
    config = configure(train__track=f"tensorboard,{name}")
    with pytest.raises(ConfigError, match=said) as raised:
        smedjan.finetune(config)
    assert raised.value.field == "train.track"
    assert "\n" not in str(raised.value)
    assert not config.out.exists()


def test_samples_stay_in_their_blocks_whatever_they_say():
    text = as_text([{"prompt": "a", "text": "```\n# no heading\n`````"}])
    assert text.count("``````") == 4


def test_no_tracker_is_imported_unasked(configure, monkeypatch):
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    smedjan.finetune(configure(train__steps=1))
