"""The README's "Your first hour": a new user types its lines, as printed and in their order, into a shell in an empty
directory that holds a made-up model and three data sets, one row of which is broken. Every one does what the README
says it does, and what it prints as output is what is printed."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.cli import app

ROOT = Path(__file__).parents[2]

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS, PAIRS = 120, 40


@dataclass(frozen=True)
class Line:
    """One line of a shell, and what the README prints below it, if it does."""

    typed: str
    printed: str | None = None


def lines(page: Path) -> list[Line]:
    """Those of the blocks `sh` (a line each) and `console` (`$ ` and a line, its output below), in their order."""
    found: list[Line] = []
    for language, block in re.findall(r"^```(sh|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if language == "sh":
            found += [Line(line) for line in block.splitlines()]
            continue
        for typed, printed in re.findall(r"^\$ (.*\n)((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            found.append(Line(typed.rstrip("\n"), printed))
    return found


def make_model(folder: Path) -> None:
    """A small Llama with every byte as a token and a chat template, as `save_pretrained` writes it; pad is eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_chats(file: Path) -> None:
    """Conversations of one turn and of two, some behind a system prompt, with a column that is no part of them."""
    topics = ("bread rises", "a lathe turns", "tides come and go", "steel hardens")
    rows = []
    for n in range(CHATS):
        messages = [
            {"role": "user", "content": f"Why is it that {topics[n % 4]}? In {n % 3 + 1} words."},
            {"role": "assistant", "content": ("Because.", "It must.", "So it goes.")[n % 3]},
        ]
        if n % 5 == 0:
            messages += [{"role": "user", "content": "Are you sure?"}, {"role": "assistant", "content": "Yes, I am."}]
        system = [{"role": "system", "content": "You are brief."}] if n % 7 == 0 else []
        rows.append({"id": f"chat-{n}", "messages": system + messages})
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def make_alpaca(file: Path, numbers: range) -> None:
    """Instructions with an input and without, umlauts among them."""
    rows = [
        {
            "instruction": "Ist die Zahl gerade oder nicht? Grüße!",
            "input": str(n),
            "output": ("gerade", "ungerade")[n % 2],
        }
        if n % 3
        else {"instruction": f"Is {n} even or odd?", "input": "", "output": ("even", "odd")[n % 2]}
        for n in numbers
    ]
    file.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")


def make_pairs(file: Path) -> None:
    """Quotes, commas and line breaks in fields; one row, at line 42, whose commas nobody quoted."""
    rows = [
        [f'Title: "The {n}th lamp", a story.\nGenre:', " fiction, short" if n % 2 else " essay"] for n in range(PAIRS)
    ]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["prompt", "completion"])
        writer.writerows(rows[: PAIRS // 2])
        stream.write("Title: Letters, collected. Genre:, essay\n")
        writer.writerows(rows[PAIRS // 2 :])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a new user has."""
    home = tmp_path / "home"
    home.mkdir()
    make_model(home / "downloaded")
    make_chats(home / "chats.parquet")
    make_alpaca(home / "alpaca.json", range(48))
    make_alpaca(home / "held-out.json", range(100, 112))
    make_pairs(home / "pairs.csv")
    return home


@dataclass(frozen=True)
class Shell:
    """`smedjan` on its PATH is this checkout's."""

    folder: Path
    env: dict[str, str]

    @classmethod
    def at(cls, folder: Path) -> Shell:
        programs = folder.parent / "bin"
        programs.mkdir()
        script = programs / "smedjan"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m smedjan "$@"\n')
        script.chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        # A width that no terminal of the tests decides
        return cls(folder, {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100"})

    def __call__(self, typed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", typed],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def interrupted(self, typed: str, out: Path) -> tuple[int, str]:
        """Exit code and stderr of a run that gets Ctrl-C, as a terminal sends it, after its second step."""
        child = subprocess.Popen(
            ["bash", "-c", typed],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        log, until = out / "smedjan" / "log.jsonl", time.monotonic() + 120
        while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < until, "no step in two minutes"
            time.sleep(0.002)
        os.killpg(child.pid, signal.SIGINT)
        said = child.communicate(timeout=60)[1]
        return child.returncode, said


def events(run: Path, key: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "smedjan" / "log.jsonl").read_text().splitlines()]
    return [event for event in found if key in event]


def falls(values: list[float]) -> bool:
    """The mean of the last quarter is below that of the first: no step, whose rows are its own, decides."""
    part = max(1, len(values) // 4)
    return sum(values[-part:]) < sum(values[:part])


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_every_command_works_as_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell, page = Shell.at(folder), lines(ROOT / "README.md")
    assert [line.typed.split()[0] for line in page].count("smedjan") == len(page) - 1, "the other one pipes into it"
    typed = [line.typed for line in page]
    done: dict[str, subprocess.CompletedProcess[str]] = {}
    for line in page:
        before = everything(folder)
        if f"{line.typed} --resume" in typed:
            code, said = shell.interrupted(line.typed, folder / "chats")
            assert code == 130, said
            stopped = re.fullmatch(r"smedjan: stopped after step (\d+); go on with --resume", last_line(said))
            assert stopped is not None, said
            continue
        ended = done[line.typed] = shell(line.typed)
        if line.printed is not None:
            assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line.printed)
            assert everything(folder) == before, "nothing was written"
            continue
        assert ended.returncode == 0, f"{line.typed}\n{ended.stderr}"
        if "--dry-run" in line.typed or " inspect " in line.typed:
            assert everything(folder) == before, "looking writes nothing"

    def said(start: str) -> str:
        """What the one line that begins so and did its work printed."""
        (found,) = [ended for line, ended in done.items() if line.startswith(start) and ended.returncode == 0]
        return found.stdout

    assert said("smedjan import") == "smollm2: llama, 108,864 parameters, float32\n"

    # Conversations: the rows, the plan, the run that was stopped, and an answer
    shown = said("smedjan data inspect chats.parquet")
    assert "<|im_start|>assistant\u23ce\n\u27e6Because.<|im_end|>\u27e7" in shown
    assert "\u27e6Yes, I am.<|im_end|>\u27e7" in shown, "both turns are trained"
    assert f"{CHATS} kept, 0 truncated, 0 dropped, 0 broken" in shown
    resume = next(line for line in typed if line.endswith(" --resume"))
    total = 3 * CHATS // 8
    planned = next(ended.stdout for line, ended in done.items() if line.endswith(" --dry-run"))
    assert re.search(rf"^rows +{CHATS} kept$", planned, re.MULTILINE)
    assert re.search(rf"^steps +{total} of 8 rows, ", planned, re.MULTILINE)
    assert re.search(r"^memory .* planned, .* available: fits$", planned, re.MULTILINE)
    assert re.search(r"^time +\S+ s a step ", planned, re.MULTILINE)
    trained = events(folder / "chats", "loss")
    assert [event["step"] for event in trained] == list(range(1, total + 1))
    assert falls([event["loss"] for event in trained])
    legs = [event["step"] for event in events(folder / "chats", "header")]
    assert legs == [0, int(stopped[1])], "it went on where it was stopped"
    monkeypatch.chdir(folder)
    words = shlex.split(resume.removesuffix(" --resume").replace("--out chats", "--out whole"))
    assert app.run(words[1:]) == 0, "the same that nobody stopped: in this process, which has loaded torch already"
    never_stopped = last_line(capsys.readouterr().out)
    assert never_stopped.rpartition("weights ")[2] == last_line(done[resume].stdout).rpartition("weights ")[2] != ""
    assert [event["loss"] for event in events(folder / "whole", "loss")] == [event["loss"] for event in trained]
    assert load_checkpoint(folder / "chats").step == total
    assert len(said("echo")) > 1

    # Alpaca: said to be converted, evaluated and sampled on the way, better than the base on rows it has not seen
    (alpaca,) = [ended for line, ended in done.items() if "--data alpaca.json" in line]
    assert "alpaca.json: Alpaca rows are read as messages" in alpaca.stderr
    evaluations = events(folder / "alpaca", "eval_loss")
    assert [event["step"] for event in evaluations] == [3, 6]
    assert falls([event["loss"] for event in events(folder / "alpaca", "loss")])
    (samples,) = events(folder / "alpaca", "samples")
    assert (samples["step"], len(samples["samples"])) == (6, 3)
    assert "step 3: eval loss" in alpaca.stderr
    assert "step 6, samples:" in alpaca.stderr
    nll = next(line for line in said("smedjan eval").splitlines() if line.startswith("nll"))
    own, _low, _high, gained, _most, least, base = map(float, re.findall(r"[-+]?\d+\.\d+", nll))
    assert own < base
    assert gained < least < 0, "by more than chance"
    assert own == pytest.approx(evaluations[-1]["eval_loss"], abs=1e-4), "that of the run, to the digits printed"

    # Prompts and completions: without the broken row, which is counted, and the model that comes of them
    (pairs,) = [ended for line, ended in done.items() if "--data pairs.csv" in line and ended.returncode == 0]
    assert "pairs.csv: 1 broken row is left out: line 42: 3 fields for 2 columns" in pairs.stderr
    assert re.search(rf"^rows +{PAIRS} kept, 1 broken; ", pairs.stderr, re.MULTILINE)
    assert f"rows {PAIRS} kept, 0 truncated, 0 dropped, 1 broken" in last_line(pairs.stdout)
    assert falls([event["loss"] for event in events(folder / "pairs", "loss")])
    made = json.loads(said("smedjan generate"))
    assert (made["ok"], made["command"]) == (True, "generate")
    assert 1 <= len(made["token_ids"]) <= 8
    merged = next(line for line in said("smedjan merge").splitlines() if line.startswith("adapter beside base"))
    assert " 100.0% " in merged, "the same likeliest tokens"
    _, loaded = AutoModelForCausalLM.from_pretrained(folder / "merged", output_loading_info=True)
    assert not any(loaded.values()), loaded
    assert said("smedjan export").startswith("merged.gguf: llama, 108,864 parameters, Q8_0")
    assert (folder / "merged.gguf").read_bytes()[:4] == b"GGUF"
    assert (folder / "merged.Modelfile").read_text().startswith("FROM ./merged.gguf")
