"""`smedjan chat DIR`."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from smedjan.cli.output import COMMON, Common, Outcome, as_json
from smedjan.cli.sampling import KNOBS, Knobs
from smedjan.errors import ConfigError, SmedjanError, nearest

if TYPE_CHECKING:
    from smedjan.generate.chat import Chat

COMMANDS = ("/reset", "/system", "/save", "/quit", "/help")
HELP = "/reset, /system TEXT, /save FILE, /quit or Ctrl-D; Ctrl-C ends an answer"


def chat(
    model: Annotated[str, Parameter(help="model directory, run directory or hub id")],
    /,
    *,
    adapter: Annotated[Path | None, Parameter(help="adapter directory of PEFT's or mlx-lm's")] = None,
    system: Annotated[str | None, Parameter(help="system prompt")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, Parameter(help="of the computation (default: as stored)")
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        Parameter(help="hold linear layers and head in 8 bits: smaller, faster, off by a little"),
    ] = None,
    knobs: Knobs = KNOBS,
    common: Common = COMMON,
) -> Outcome:
    """Talk with a model, a message a line, from a terminal or a pipe.

    An answer ends where the model stops, or the context.

    Example: smedjan chat smollm2 --temperature 0.7
    """
    from smedjan.api import load
    from smedjan.generate.chat import Chat

    sampling = knobs.sampling()
    loaded = load(model, backend=common.backend, dtype=dtype, adapter=adapter, quantize=quantize)
    talk = Chat(
        loaded.session,
        loaded.tokenizer,
        sampling=sampling,
        max_new_tokens=knobs.max_new_tokens,
        stop=knobs.stop,
        system=system,
    )
    session = loaded.session
    common.note(f"{session.backend.name}, a context of {session.config.max_position_embeddings} tokens. {HELP}.")
    turns = 0
    for line in _lines(common):
        said = line[1:] if line.startswith("//") else line
        try:
            if said == line and line.startswith("/"):
                told = command(talk, line)
                if told is None:
                    break
                common.note(told)
                continue
            turns += 1
            _turn(talk, said, turns, common)
        except SmedjanError as error:
            _tell(error, turns, common)
    fields = {
        "backend": session.backend.name,
        "device": session.backend.device,
        "exact": session.backend.exact,
        "plan_hash": next((program.plan_hash for program in reversed(session.programs.values())), None),
        "messages": talk.conversation(),
    }
    return Outcome(fields=fields)


def command(talk: Chat, line: str) -> str | None:
    """Does what a line that begins with a slash asks. What to tell of it; None: to leave."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/quit":
        return None
    if name == "/reset":
        talk.reset()
        return "a new conversation"
    if name == "/system":
        talk.system = rest or None
        return "the system prompt is set" if rest else "no system prompt"
    if name == "/save":
        _save(talk, rest)
        return f"saved to {rest}"
    if name == "/help":
        return HELP
    close = nearest(name, COMMANDS)
    raise ConfigError("is no command", field=name, remedy=f"did you mean {close}?" if close else HELP)


def _save(talk: Chat, name: str) -> None:
    from smedjan.checkpoint.atomic import write_atomic

    if not name:
        raise ConfigError("needs a file", field="/save", remedy="give its name")
    if Path(name).exists():
        raise ConfigError("exists already", file=name, field="/save", remedy="give another name")
    if not talk.messages:
        raise ConfigError("there is no message yet", field="/save", remedy="say something first")
    write_atomic(Path(name), (json.dumps({"messages": talk.conversation()}, ensure_ascii=False) + "\n").encode())


def _turn(talk: Chat, said: str, number: int, common: Common) -> None:
    def show(piece: str) -> None:
        if piece and not common.json:
            print(piece, end="", flush=True)

    with _interruptible() as interrupted:
        turn = talk.say(said, show=show, interrupted=interrupted)
    print(as_json({"turn": number, **asdict(turn)}) if common.json else "", flush=True)
    full = turn.prompt_tokens + len(turn.token_ids) == talk.session.config.max_position_embeddings
    if turn.finish_reason == "length" and full:
        common.note("the context is full: /reset begins a new conversation")


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C is noted, and a second one raises. Off the main thread Python takes no signals: nothing is."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted = False

    def note(signum: int, frame: Any) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(error: SmedjanError, turn: int, common: Common) -> None:
    """The conversation goes on."""
    if common.json:
        told = {"message": error.message, "file": error.file, "field": error.field, "remedy": error.remedy}
        print(as_json({"turn": turn, "error": told}), flush=True)
    else:
        print(f"smedjan: {error}", file=sys.stderr, flush=True)


def _lines(common: Common) -> Iterator[str]:
    """What is typed, or piped; lines without a word are none."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    with contextlib.suppress(ImportError):  # Windows has its own line editing
        import readline  # noqa: F401
    while True:
        try:
            line = input("" if common.json else "> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)
            continue
        if line:
            yield line
