"""What goes wrong for whoever fine-tunes, one test at least for each: here, or where the table says.

    disaster                                            test
    pad == eos never stops                              tests/train/test_disasters.py::test_a_model_whose_pad_token_is_its_stop_token_stops
                                                        tests/data/test_collate.py::test_padding_with_the_stop_token_untrains_none
    a template without generation marks                 tests/data/test_training_template.py::test_prefix_difference_finds_the_same
                                                        tests/data/test_mask.py::test_turns_are_trained_with_their_stop_token_and_nothing_else
                                                        tests/data/test_mask.py::test_a_template_that_changes_earlier_turns_is_refused
    truncation that masks everything                    tests/train/test_disasters.py::test_truncation_that_masks_everything
                                                        tests/data/test_mask.py::test_a_cut_row_keeps_a_prefix_or_goes
    packing that leaks                                  tests/train/test_accumulation.py::test_a_document_cannot_see_its_neighbour
                                                        tests/train/test_accumulation.py::test_no_packing_leaks
    resume that restarts the data                       tests/train/test_disasters.py::test_a_resumed_run_trains_on_the_rows_that_come_next
                                                        tests/train/test_resume.py::test_kill_9_then_resume
    gradient accumulation that changes the loss         tests/train/test_accumulation.py::test_gradients_of_every_split
                                                        tests/train/test_accumulation.py::test_adapters_gradients_of_every_split
                                                        tests/train/test_accumulation.py::test_runs_that_accumulate_alike
    merged QLoRA worse than unmerged                    tests/evaluate/test_fidelity.py::test_a_merged_qlora_is_shown_to_be_worse_than_it_was
    tied embeddings with new tokens                     tests/train/test_new_tokens.py::test_a_full_run_loads_in_transformers
                                                        tests/train/test_new_tokens.py::test_merged_it_is_a_model_of_transformers
                                                        tests/train/test_new_tokens.py::test_the_steps_are_pefts
    double BOS                                          tests/train/test_disasters.py::test_one_bos_in_training_and_in_serving
                                                        tests/data/test_inspect.py::test_bos_twice
                                                        tests/data/test_mask.py::test_a_second_bos_is_refused
    two adapters on one base                            tests/runtime/test_adapters.py::test_switching_gives_the_bits_of_a_fresh_load
    an evaluation that needs more memory than training  tests/train/test_early_stopping.py::test_an_evaluation_needs_no_more_memory_than_training
                                                        tests/evaluate/test_score.py::test_losses_need_no_logits_that_training_does_not
    SIGKILL during save                                 tests/checkpoint/test_run_dir.py::test_a_kill_before_any_system_call_leaves_a_whole_checkpoint
                                                        tests/train/test_resume.py::test_kill_9_then_resume
    a full disk during save (a small tmpfs)             tests/train/test_disasters.py::test_a_full_disk_during_a_save
                                                        tests/train/test_processes.py::test_a_full_disk_of_one_is_said_once_and_leaves_nothing
    clock going backwards                               tests/train/test_header.py::test_a_clock_that_goes_backwards_or_stands_still
                                                        tests/train/test_disasters.py::test_a_clock_set_back_before_a_resume
    a data file that changes under a run                tests/train/test_data.py::test_a_data_file_that_changes_under_a_run
                                                        tests/data/test_cache.py::test_a_file_that_changes_while_it_is_read

And here: a run among other processes, and on a machine without a network.
"""  # noqa: E501  (a test is found by its whole name)

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

import smedjan
from smedjan.checkpoint.lock import holder
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.cli import app
from smedjan.data import dataset
from smedjan.data.collate import IGNORE, collate
from smedjan.errors import ConfigError, DataError
from smedjan.evaluate.rows import prompt_ids
from smedjan.generate.chat import Chat
from smedjan.train import log
from smedjan.train.parts import Finetune
from smedjan.train.step import Trainer

ROOT = Path(__file__).parents[2]
DISASTERS = 15
"""Of the issue that asked for them."""


def test_the_table_names_tests_that_are_there():
    rows = re.findall(r"^    (\S.*?|) +(tests/[\w/]+\.py)::(\w+)$", str(__doc__), re.MULTILINE)
    assert len([name for name, _, _ in rows if name]) == DISASTERS
    for _, file, name in rows:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


def masked_by_id(rows, **given):
    """What many trainers do: no label is the pad token's id."""
    batch = collate(rows, **given)
    labels = np.where(batch.labels == given["pad_id"], IGNORE, batch.labels)
    trained = np.flatnonzero(labels != IGNORE)
    return replace(batch, labels=labels, loss_rows=trained, trained_tokens=len(trained))


@pytest.mark.parametrize("by_id", [False, True])
def test_a_model_whose_pad_token_is_its_stop_token_stops(configure, write_rows, tiny, monkeypatch, by_id):
    """Token 0 is both here. Each answer learnt by heart is given and ended; with labels masked by the token's id the
    same run gives every answer and then talks on."""
    answers = {"hello ": "world", "this ": "is a tiny text", "a ": "x", "text ": "hello world hello"}
    rows = write_rows([{"prompt": prompt, "completion": answer} for prompt, answer in answers.items()], "answers.jsonl")
    config = configure(data=str(rows), backend="cpu_native", train__steps=120, optim__lr=5e-3)
    assert Finetune(config).tokenizer.eos_token_id == Finetune(config).steps.pad_id == 0
    if by_id:
        monkeypatch.setattr(dataset, "collate", masked_by_id)
    model = smedjan.load(smedjan.finetune(config).run_dir, backend="torch_reference")
    for prompt, answer in answers.items():
        expected = model.tokenizer.encode(answer, False)
        made = list(model.generate(model.tokenizer.encode(prompt), max_new_tokens=len(expected) + 8))
        assert made[: len(expected)] == expected, "it has learnt the answer"
        assert (made[len(expected) :] == [0]) == (not by_id)
        assert (0 in made) == (not by_id)


def test_truncation_that_masks_everything(configure, write_rows, read_log):
    """Of a prompt that fills the row no answer is left to train: such rows go and are counted, no step divides by no
    token, and where all are such, nothing is trained or written."""
    long, short = {"prompt": "hello world " * 12, "completion": "a"}, {"prompt": "hello ", "completion": "world"}
    flags = {"train__max_length": 16, "train__too_long": "truncate", "train__steps": 3, "train__batch_size": 1}
    run = smedjan.finetune(configure(data=str(write_rows([long, short, long], "mixed.jsonl")), **flags))
    assert run.rows == {"kept": 1, "truncated": 0, "dropped": 2, "broken": 0}
    steps = read_log(run.run_dir).steps
    assert len(steps) == 3
    assert all(step["trained_tokens"] > 0 and step["loss"] > 0 for step in steps)
    config = configure("none", data=str(write_rows([long, long], "long.jsonl")), **flags)
    with pytest.raises(DataError, match="no trained token: all 2 rows are longer than 16 tokens") as raised:
        smedjan.finetune(config)
    assert "\n" not in str(raised.value)
    assert not config.out.exists()


class Stop(Exception):
    """Raised by a test's `on_step`."""


def stopped_after(config, step):
    """The run as a crash right after `step` leaves it."""

    def on_step(event):
        if event["step"] == step and "loss" in event:
            raise Stop

    with pytest.raises(Stop):
        smedjan.finetune(config, on_step=on_step)


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_trains_on_the_rows_that_come_next(configure, monkeypatch, packing):
    """Those of the step after the checkpoint, over the end of an epoch: every batch of both legs is the one that a run
    nobody stopped trains on there."""
    seen, step = [], Trainer.step

    def watched(trainer, batches, **given):
        seen.append(tuple(batch.input_ids.tobytes() for batch in batches))
        return step(trainer, batches, **given)

    monkeypatch.setattr(Trainer, "step", watched)
    flags = {"train__steps": 14, "train__save_every": 2, "train__packing": packing}
    smedjan.finetune(configure("whole", **flags))
    order, seen[:] = list(seen), []
    assert len(set(order)) == len(order) == 14, "every step has rows of its own"
    config = configure("stopped", **flags)
    stopped_after(config, 5)
    smedjan.finetune(replace(config, resume=True))
    assert seen == order[:5] + order[4:], "from the checkpoint after step 4 on"


def test_one_bos_in_training_and_in_serving(configure, write_rows, tiny, tmp_path):
    """The tokenizer adds BOS and the chat template writes one: a conversation has one, and `chat` and `eval` send the
    very tokens that training shows before the answer."""
    model = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.save(str(model / "tokenizer.json"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    turn = "{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}"
    template = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    settings |= {"bos_token": "<bos>", "chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    larger = LlamaForCausalLM.from_pretrained(tiny)
    larger.resize_token_embeddings(bos + 1, mean_resizing=False)
    larger.save_pretrained(model)

    asked = [{"role": "user", "content": "hello"}]
    rows = write_rows([{"messages": [*asked, {"role": "assistant", "content": "world"}]}], "chats.jsonl")
    config = configure(model=str(model), data=str(rows), train__steps=1)
    (example,) = Finetune(config).dataset.examples
    shown = example.input_ids.tolist()
    assert shown.count(bos) == 1
    assert shown[0] == bos
    before = shown[: example.labels_mask.tolist().index(True)]
    loaded = smedjan.load(model, backend="torch_reference")
    assert prompt_ids(loaded.tokenizer, tuple(asked)) == before
    turn = Chat(loaded.session, loaded.tokenizer, max_new_tokens=1).say("hello")
    assert turn.prompt_tokens == len(before)
    plain = loaded.tokenizer.encode("hello")
    assert plain.count(bos) == 1, "a text has the tokenizer's"
    for number, text in enumerate(("<bos>hello", "<bos>")):
        with pytest.raises(DataError, match="begins with <bos> twice"):
            smedjan.finetune(replace(config, data=write_rows([{"text": text}], f"twice-{number}.jsonl")))


def test_a_clock_set_back_before_a_resume(configure, write_rows, tiny, tmp_path, monkeypatch):
    """The chat template prints the date, and the clock is set back by a year between the two legs: the rows of a run
    are those of the day on which it began, and so are its weights."""
    model = shutil.copytree(tiny, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%d %b %Y') }}" + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    chats = [[{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "world"}] for n in range(8)]
    data = write_rows([{"messages": chat} for chat in chats], "chats.jsonl")
    flags = {"model": str(model), "data": str(data), "train__steps": 4, "train__save_every": 1}

    def on(day):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(*day, tzinfo=tz)

        monkeypatch.setattr(log, "datetime", Clock)

    on((2026, 3, 1))
    whole = smedjan.finetune(configure("whole", **flags))
    stopped_after(configure("stopped", **flags), 2)
    on((2025, 3, 1))
    resumed = smedjan.finetune(configure("stopped", **flags, resume=True))
    assert resumed.weights_sha256 == whole.weights_sha256
    assert smedjan.finetune(configure("other", **flags)).weights_sha256 != whole.weights_sha256, (
        "the date is in the rows"
    )


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def running(configure):
    """A run of very many steps in a process of its own, which has taken its first."""
    config = configure("running", train__steps=100_000, train__save_every=0)
    words = ["finetune", "--quiet", "--model", config.model, "--data", config.data, "--out", config.out]
    words += ["--method", "full", "--backend", "torch_reference", "--train.batch-size", "4", "--optim.lr", "1e-2"]
    words += ["--train.steps", "100000", "--train.save-every", "0"]
    child = subprocess.Popen(
        [sys.executable, "-m", "smedjan", *map(str, words)],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, until = config.out / "smedjan" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < until, "no step in two minutes"
        time.sleep(0.01)
    yield config, child
    child.kill()
    child.communicate()


def test_a_run_is_asked_for_a_checkpoint_and_guarded_until_it_is_killed(running, capsys):
    config, child = running
    assert app.run(["run", "save", str(config.out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["command"], made["pid"]) == ("run save", child.pid)
    found = load_checkpoint(config.out)
    assert (str(found.path), found.step) == (made["checkpoint"], made["step"])
    assert child.poll() is None, "the run goes on"

    with pytest.raises(ConfigError, match=f"process {child.pid} on .* writes this run"):
        smedjan.finetune(replace(config, resume=True))
    assert holder(config.out)["pid"] == child.pid, "the refused one let go of nothing"

    child.send_signal(signal.SIGKILL)
    child.wait()
    assert app.run(["run", "save", str(config.out)]) == 2
    assert "no process writes this run" in capsys.readouterr().err

    class Stop(Exception):
        pass

    seen = []

    def on_step(event):
        seen.append(event)
        if "loss" in event:
            raise Stop

    with pytest.raises(Stop):
        smedjan.finetune(replace(config, resume=True), on_step=on_step)
    assert seen[0]["header"]["steps"]["done"] == made["step"], "it goes on from the checkpoint that was asked for"
    assert holder(config.out) is None


FULL = """
import json, subprocess, sys
from pathlib import Path
import smedjan
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.errors import CheckpointError
from smedjan.train.config import FinetuneConfig

flags = json.load(sys.stdin)
disk = Path(flags["out"]).parent
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "smedjan", disk], check=True)
try:
    smedjan.finetune(FinetuneConfig.from_toml(None, flags))
    said = None
except CheckpointError as error:
    said = {"error": str(error), "errno": error.__cause__.errno}
found = load_checkpoint(Path(flags["out"]))
left = [str(path) for path in Path(flags["out"]).rglob("*.tmp")]
subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
resumed = smedjan.finetune(FinetuneConfig.from_toml(None, {**flags, "resume": True}))
print(json.dumps({"said": said, "step": found.step, "left": left, "weights": resumed.weights_sha256}))
"""
"""Mounts a disk of one megabyte in a namespace of its own, trains on it until it is full, then gives it more."""


def own_mounts() -> list[str]:
    """The command that may mount, in a namespace that goes with it."""
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        tried = subprocess.run(
            [*words, "sh", "-c", "mount -t tmpfs -o size=1m smedjan /mnt"], capture_output=True, check=False
        )
        if tried.returncode == 0:
            return words
    return []


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_during_a_save(configure, tmp_path):
    """The checkpoint before is whole, nothing half-written is left, and the run goes on to the weights of one that
    always had room."""
    words = own_mounts()
    if not words:
        pytest.skip("this machine lets nobody mount a tmpfs, in a user namespace neither")
    (tmp_path / "disk").mkdir()
    flags = {"train__steps": 4, "train__save_every": 1}
    config = configure("disk/run", **flags)
    child = subprocess.run(
        [*words, sys.executable, "-c", FULL],
        input=json.dumps(config.to_dict()),
        env=ENV,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["said"] is not None, "a megabyte was enough: the disk is too large for this test"
    assert "the disk is full" in found["said"]["error"]
    assert "\n" not in found["said"]["error"]
    assert os.strerror(found["said"]["errno"]) == "No space left on device"
    assert found["step"] == 1
    assert found["left"] == []
    assert found["weights"] == smedjan.finetune(configure("whole", **flags)).weights_sha256


_opened: list[str] = []
_listening = [False]


def _hook(name, given):
    if _listening[0] and name.startswith("socket.") and name != "socket.gethostname":
        _opened.append(name)


def test_a_run_opens_no_socket(configure, write_rows, tmp_path):
    """No telemetry: none is made in Python, and none is open in the process at any event. With all that a run can do
    on its own: evaluation, samples, checkpoints, TensorBoard's files."""
    import socket

    sys.addaudithook(_hook)  # stays for good, silent after this test

    def sockets():
        if not os.path.isdir("/proc/self/fd"):
            return set()
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:  # the listing's own
                continue
            if target.startswith("socket:"):
                found.add(target)
        return found

    valid = write_rows([{"prompt": "hello 3 ", "completion": "world 0"}], "valid.jsonl")
    config = configure(
        eval_data=str(valid),
        method="lora",
        train__steps=3,
        train__save_every=1,
        train__sample_every=1,
        train__track="tensorboard",
    )
    before, during = sockets(), []
    _opened.clear()
    _listening[0] = True
    try:
        smedjan.finetune(config, on_step=lambda event: during.append(sockets() - before))
        assert _opened == []
        socket.socket().close()
        assert _opened, "the hook hears a socket that is made"
    finally:
        _listening[0] = False
    assert len(during) > 6
    assert not any(during)
