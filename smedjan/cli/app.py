"""The app: verbs, usage errors and exit codes. Nothing here or in a verb's module imports a library that computes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError
from cyclopts.exceptions import MissingArgumentError, UnknownCommandError, UnknownOptionError

import smedjan
from smedjan.cli.chat import chat
from smedjan.cli.data import inspect
from smedjan.cli.doctor_command import doctor
from smedjan.cli.evaluate import evaluate
from smedjan.cli.export import export
from smedjan.cli.families import families
from smedjan.cli.finetune import finetune
from smedjan.cli.generate import generate
from smedjan.cli.graph import graph
from smedjan.cli.import_model import import_model
from smedjan.cli.info import info
from smedjan.cli.merge import merge
from smedjan.cli.output import Outcome, envelope
from smedjan.cli.parity import parity
from smedjan.cli.report import report
from smedjan.cli.run_history import history
from smedjan.cli.run_save import save
from smedjan.errors import ConfigError, Elsewhere, SmedjanError, nearest
from smedjan.train.processes import first

VERBS: dict[str, Callable[..., Outcome]] = {
    "import": import_model,
    "export": export,
    "parity": parity,
    "families": families,
    "finetune": finetune,
    "merge": merge,
    "generate": generate,
    "chat": chat,
    "eval": evaluate,
    "data inspect": inspect,
    "run save": save,
    "run history": history,
    "info": info,
    "graph": graph,
    "report": report,
    "doctor": doctor,
}

app = App(
    name="smedjan",
    help="Train and own a language model: one graph, lowered to torch, Triton and MLX.",
    version=smedjan.__version__,
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
GROUPS = {
    "data": App(name="data", help="Look at rows before they are trained on.", help_format="plaintext"),
    "run": App(name="run", help="Ask something of a run.", help_format="plaintext"),
}
for _group in GROUPS.values():
    app.command(_group)
for _name, _function in VERBS.items():
    GROUPS.get(_name.split()[0], app).command(_function, name=_name.split()[-1])


def run(argv: Sequence[str]) -> int:
    """Runs one command and prints its outcome; gives the exit code. A defect of ours escapes with its traceback."""
    flags = argv[: argv.index("--")] if "--" in argv else argv
    in_json = "--json" in flags
    command = next((verb for verb in (" ".join(argv[:2]), *argv[:1]) if verb in VERBS), "")
    try:
        outcome = app(list(argv), exit_on_error=False, print_error=False)
        if not isinstance(outcome, Outcome):
            return 0
        text = envelope(command, outcome.ok, outcome.fields) if in_json else outcome.text
        if text and first():
            print(text, flush=True)
        return 0 if outcome.ok else 1
    except CycloptsError as problem:
        return _fail(command, usage_error(problem, command), in_json, 2)
    except Elsewhere:
        return 2
    except SmedjanError as problem:
        return _fail(command, problem, in_json, 2)
    except KeyboardInterrupt as stop:
        if not first():
            return 130
        return _fail(command, SmedjanError(str(stop) or "interrupted"), in_json, 130)
    except BrokenPipeError:
        # The reader of `smedjan graph DIR | head` has gone: the flush at exit must not complain a second time
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def usage_error(problem: CycloptsError, command: str) -> SmedjanError:
    """A usage error in our words: one line with the field and the nearest known name."""
    see = f"see smedjan {command} --help" if command else "see smedjan --help"
    if isinstance(problem, UnknownOptionError) and problem.token is not None and command:
        name = (problem.token.keyword or problem.token.value).split("=")[0]
        close = _nearest_flag(name, known_flags(command))
        return ConfigError("is no flag", field=name, remedy=f"did you mean {close}?" if close else see)
    if isinstance(problem, UnknownCommandError) and problem.unused_tokens:
        name = problem.unused_tokens[0]
        close = nearest(name, {word for verb in VERBS for word in verb.split()})
        return ConfigError("is no command", field=name, remedy=f"did you mean {close}?" if close else see)
    if isinstance(problem, MissingArgumentError) and problem.argument is not None:
        return ConfigError("is missing", field=problem.argument.name, remedy=see)
    return ConfigError(" ".join(str(problem).split()).rstrip("."), remedy=see)


def known_flags(command: str) -> list[str]:
    """Every flag of a verb as it is typed; positional arguments are not among them."""
    verb = app
    for word in command.split():
        verb = verb[word]
    arguments = verb.assemble_argument_collection(parse_docstring=False)
    return sorted({name for argument in arguments for name in argument.names if name.startswith("--")})


def _nearest_flag(name: str, known: list[str]) -> str | None:
    """Of another section first: `--train.lr` means --optim.lr, which spelling alone would not find."""
    last = name.lstrip("-").rpartition(".")[2].replace("_", "-")
    return next((flag for flag in known if flag.lstrip("-").rpartition(".")[2] == last), None) or nearest(name, known)


def _fail(command: str, error: SmedjanError, in_json: bool, code: int) -> int:
    if in_json:
        fields = {"message": error.message, "file": error.file, "field": error.field, "remedy": error.remedy}
        print(envelope(command, False, {}, fields), flush=True)
    else:
        print(f"smedjan: {error}", file=sys.stderr)
    return code
