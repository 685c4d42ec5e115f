"""`smedjan chat` through a pipe and through a terminal."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smedjan.cli import app
from smedjan.data.formats import read_rows
from tests.train.conftest import tiny  # noqa: F401  (fixture)

FLAGS = ["--backend", "cpu_native", "--max-new-tokens", "5"]


def through_a_pipe(words, lines, capsys, monkeypatch):
    """Exit code and what is printed, in this process, on what a pipe gives."""
    read, write = os.pipe()
    os.write(write, "".join(line + "\n" for line in lines).encode())
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        code = app.run(["chat", *words])
    return code, *capsys.readouterr()


def test_a_pipe_in_json(tiny, tmp_path, capsys, monkeypatch):  # noqa: F811
    saved = tmp_path / "talk.jsonl"
    lines = ["hello", "", "/system tiny", f"/save {saved}", "world", f"/save {saved}", "/resett", "/reset", "//hello"]
    code, out, err = through_a_pipe([str(tiny), *FLAGS, "--json"], [*lines, "/quit", "never"], capsys, monkeypatch)
    *turns, last = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    one, two, exists, unknown, three = turns
    keys = {"turn", "text", "token_ids", "finish_reason", "prompt_tokens", "cached_tokens", "tokens_per_s"}
    assert set(one) == set(two) == set(three) == keys
    assert [turn["turn"] for turn in (one, two, three)] == [1, 2, 3]
    assert len(one["token_ids"]) == 5
    assert one["cached_tokens"] == 0
    assert exists["error"]["message"] == "exists already"
    assert unknown["error"]["remedy"] == "did you mean /reset?"
    assert (last["command"], last["backend"], last["ok"]) == ("chat", "cpu_native", True)
    said = [message["content"] for message in last["messages"]]
    assert said == ["tiny", "/hello", three["text"]]
    (row,) = read_rows(saved)
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
    assert row.messages[-1]["content"] == one["text"]
    assert "a new conversation" in err


def test_a_pipe_of_text(tiny, capsys, monkeypatch):  # noqa: F811
    """Answers alone on stdout; a conversation that is too long is one line on stderr, and the next goes on."""
    lines = ["hello", "word " * 60, "world"]
    code, out, err = through_a_pipe([str(tiny), *FLAGS], lines, capsys, monkeypatch)
    assert code == 0
    assert sum("the context ends at 64" in line for line in err.splitlines()) == 1
    quiet, again, silent = through_a_pipe([str(tiny), *FLAGS, "--quiet"], ["hello", "world"], capsys, monkeypatch)
    assert (quiet, silent) == (0, "")
    assert again == out
    eight, _, _ = through_a_pipe([str(tiny), *FLAGS, "--quantize", "int8"], ["hello"], capsys, monkeypatch)
    assert eight == 0


def test_no_template_is_one_line_and_code_2(tiny, tmp_path, capsys, monkeypatch):  # noqa: F811
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    code, out, err = through_a_pipe([str(bare)], ["hello"], capsys, monkeypatch)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "chat template" in err
    assert "add chat_template.jinja" in err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_a_terminal_and_ctrl_c(tiny, tmp_path):  # noqa: F811
    """Ctrl-C ends a long answer and nothing else; at the prompt it tells how to leave; Ctrl-D leaves."""
    import pty

    long = tmp_path / "long"
    shutil.copytree(tiny, long)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    ours, theirs = pty.openpty()
    # A session of its own, whose controlling terminal is the pty: its Ctrl-C goes to the child alone.
    child = subprocess.Popen(
        [sys.executable, "-c", LEADER, "chat", str(long), "--backend", "cpu_native"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    try:
        shown = Terminal(ours)
        shown.until("> ")
        os.write(ours, b"hello\r")
        shown.until("hello\r\n")
        shown.more(200)  # it streams: text is there long before the answer's end
        assert child.poll() is None
        assert "> " not in shown.text
        os.write(ours, b"\x03")
        shown.until("> ")
        # Python sees a signal between the prompt and readline's wait for a key only with the next one.
        shown.until("/quit or Ctrl-D", poke=b"\x03")
        shown.until("> ")
        os.write(ours, b"/reset\r")
        shown.until("a new conversation")
        shown.until("> ")
        # Likewise: what ends a line of a terminal is a key once readline has taken over.
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            os.write(ours, b"\x04")
            time.sleep(0.5)
        assert child.poll() == 0
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            child.wait()
        os.close(ours)


LEADER = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from smedjan.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


class Terminal:
    """What a child shows, from the last thing waited for on."""

    def __init__(self, fd: int) -> None:
        self.fd, self.text = fd, ""

    def _read(self, deadline: float, poke: bytes = b"") -> None:
        while True:
            if poke:
                os.write(self.fd, poke)
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.fd], [], [], max(0.0, min(left, 1.0) if poke else left))
            if ready:
                self.text += os.read(self.fd, 4096).decode(errors="replace")
                return
            assert left > 0, f"nothing more after {self.text!r}"

    def until(self, wanted: str, *, poke: bytes = b"") -> None:
        """`poke` is typed again and again until then."""
        deadline = time.monotonic() + 120
        while wanted not in self.text:
            self._read(deadline, poke)
        self.text = self.text[self.text.index(wanted) + len(wanted) :]

    def more(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.text) < count:
            self._read(deadline)
