"""The command line's contract: the flag set, exit codes, one-line errors and the JSON envelope."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from smedjan.cli import app
from smedjan.cli.output import Outcome, as_json, table
from smedjan.errors import CheckpointError
from smedjan.train.config import flags

ROOT = Path(__file__).parents[2]

COMMON = {"--json", "--quiet", "--backend", "--interpret"}

KNOBS = {
    *("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed", "--stop"),
}

# Names here are fixed: add freely, change only with a deprecation
FLAGS = {
    "import": {"--dtype", "--ignore-key", "--max-shard-size"},
    "export": {"--to", "--type", "--bits", "--group-size", "--adapter", "--ignore-key"},
    "parity": {"--attention", "--dtype", "--html", "--length"},
    "families": {"--family", "--markdown"},
    "finetune": {
        *("--config", "--model", "--data", "--eval-data", "--out", "--method", "--resume", "--dry-run", "--seed"),
        *("--dtype", "--train.steps", "--train.epochs", "--train.batch-size", "--train.grad-accum"),
        *(
            "--train.max-length",
            "--train.packing",
            "--train.loss-on",
            "--train.too-long",
            "--train.broken",
            "--train.save-every",
            "--train.keep",
        ),
        *(
            "--train.eval-every",
            "--train.sample-every",
            "--train.sample-prompts",
            "--train.track",
            "--train.attention",
            "--train.fp8",
            "--train.int8-forward",
            "--train.memory",
            "--train.freeze",
            "--train.only",
            "--train.z-loss",
            "--train.label-smoothing",
            "--train.neftune",
            "--train.new-tokens",
            "--lora.modules-to-save",
            "--optim.name",
            "--optim.lr",
            "--optim.lr-pattern",
            "--optim.weight-decay",
            "--optim.master",
            "--optim.state",
            "--optim.rounding",
        ),
        *(
            "--optim.clip",
            "--optim.max-skipped",
            "--optim.momentum",
            "--optim.muon-adjust",
            "--optim.adamw-lr",
            "--optim.rho",
            "--optim.hessian-every",
            "--train.ema",
            "--train.patience",
            "--train.min-delta",
            "--optim.schedule",
            "--optim.warmup",
            "--optim.cycles",
            "--optim.beta1",
            "--optim.beta2",
            "--optim.eps",
        ),
        *("--lora.rank", "--lora.alpha", "--lora.dropout", "--lora.targets", "--lora.last-layers"),
        *("--lora.rslora", "--lora.rank-pattern", "--lora.alpha-pattern", "--lora.init"),
        "--lora.dora",
        "--lora.bits",
    },
    "merge": {"--dtype", "--onto", "--storage", "--check", "--no-check", "--data"},
    "generate": {"--adapter", "--dtype", "--quantize"} | KNOBS,
    "chat": {"--adapter", "--system", "--dtype", "--quantize"} | KNOBS,
    "eval": {"--data", "--task", "--adapter", "--against", "--limit", "--predictions", "--batch-size"} | KNOBS,
    "data inspect": {
        *("--model", "--split", "--rows", "--max-length", "--loss-on", "--too-long", "--broken", "--html"),
    },
    "run save": {"--timeout"},
    "run history": set(),
    "info": set(),
    "graph": {
        *("--plan", "--forward", "--unfold", "--batch-size", "--length", "--dtype", "--attention"),
        *("--method", "--packing", "--memory", "--fp8", "--int8-forward", "--decode", "--quantize"),
    },
    "report": {"--out", "--live"},
    "doctor": set(),
}

ENVELOPE = {"schema", "command", "ok", "versions", "backend", "device", "exact", "plan_hash", "error"}


@pytest.mark.parametrize("verb", FLAGS)
def test_flag_set_is_frozen(verb: str) -> None:
    assert set(app.known_flags(verb)) == FLAGS[verb] | COMMON


def test_verbs_are_frozen() -> None:
    assert set(app.VERBS) == set(FLAGS)


def test_finetune_has_every_key_of_its_config() -> None:
    assert {f"--{name}" for name in flags()} <= set(app.known_flags("finetune"))


@pytest.mark.parametrize("verb", FLAGS)
def test_help_shows_every_flag_and_one_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in FLAGS[verb] | COMMON)
    examples = re.findall(r"Example: (smedjan .*?)\n\n", shown, re.DOTALL)
    assert len(examples) == 1
    words = examples[0].replace('"The forge is"', "prompt").split()
    assert words[: 1 + len(verb.split())] == ["smedjan", *verb.split()]
    function, _bound, _ignored = app.app.parse_args(words[1:], exit_on_error=False, print_error=False)
    assert function is app.VERBS[verb]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetun"], "finetun: is no command; did you mean finetune?"),
        (["finetune", "--train.lr", "1"], "--train.lr: is no flag; did you mean --optim.lr?"),
        (["finetune", "--lora.rnak=4"], "--lora.rnak: is no flag; did you mean --lora.rank?"),
        (["info"], "MODEL: is missing; see smedjan info --help"),
        (["finetune", "--data", "x", "--out", "y"], "model: is missing; give --model"),
        (["finetune", "--model", "m", "--data", "d", "--out", "o", "--optim.lr", "fast"], "optim.lr: 'fast' is not"),
        (["finetune", "--model", "m", "--data", "d"], "out: is missing; give --out DIR, or --dry-run"),
        (["generate", "m", "p", "--top-k", "x"], "--top-k"),
        (["graph", "m", "--length", "0"], "length: is 0; give 1 or more"),
        (["graph", "m", "--interpret"], "interpret: is for Triton's kernels; give --backend cuda_triton too"),
        (["doctor", "--backend", "torch_referense"], "did you mean torch_reference?"),
        (["info", "does/not/exist"], "does/not/exist"),
        (["data", "inspect", "rows.jsonl"], "--model: is missing; see smedjan data inspect --help"),
        (["data", "inspct", "rows.jsonl"], "inspct: is no command; did you mean inspect?"),
        (["data", "inspect", "r.jsonl", "--model", "m", "--rows", "-1"], "rows: is -1; give 0 or more"),
        (["data", "inspect", "r.jsonl", "--model", "does/not/exist"], "does/not/exist"),
        (["report", "does/not/exist"], "does/not/exist: is no directory"),
        (["run", "save", "does/not/exist"], "does/not/exist: is no directory"),
        (["run", "history", "does/not/exist"], "does/not/exist: is no directory"),
        (["run", "history", "docs"], "docs/smedjan/log.jsonl: no training log; give the --out directory"),
        (["run", "save", "docs", "--timeout", "0"], "timeout: is 0; give more than 0 seconds"),
        (["run", "save", "docs"], "docs: no process writes this run"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("smedjan: ")
    assert message in printed.err


def test_error_in_json_is_the_envelope(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["finetune", "--model", "m", "--data", "d", "--out", "o", "--lora.rank", "0", "--json"]) == 2
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == ""
    assert set(found) == ENVELOPE
    assert (found["command"], found["ok"]) == ("finetune", False)
    assert found["error"]["field"] == "lora.rank"
    assert found["error"]["remedy"]


def test_usage_error_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["info", "--json", "--nonsense"]) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False


def use(monkeypatch: pytest.MonkeyPatch, outcome: Outcome | BaseException) -> None:
    """`smedjan` with an app that gives this, whatever it is called with."""

    def fake(*_words: object, **_options: object) -> Outcome:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(app, "app", fake)


def test_outcome_in_json_keeps_the_envelope(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Outcome(fields={"backend": "cpu_native", "path": Path("a/b"), "nll": math.nan}))
    assert app.run(["eval", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == ENVELOPE | {"path", "nll"}
    assert (found["backend"], found["path"], found["nll"], found["error"]) == ("cpu_native", "a/b", None, None)
    assert found["versions"]["smedjan"]


def test_an_outcome_that_is_not_ok_is_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Outcome(ok=False))
    assert app.run(["parity", "m"]) == 1


def test_ctrl_c_is_code_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, KeyboardInterrupt("stopped after step 3; go on with --resume"))
    assert app.run(["finetune"]) == 130
    assert capsys.readouterr().err == "smedjan: stopped after step 3; go on with --resume\n"


def test_an_error_names_file_field_and_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, CheckpointError("is\ntruncated", file="w.safetensors", field="x", remedy="fetch it again"))
    assert app.run(["info", "m"]) == 2
    assert capsys.readouterr().err == "smedjan: w.safetensors: x: is truncated; fetch it again\n"


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        app.run(["info", "m"])


def test_json_keys_in_the_docs_are_those_of_the_envelope() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    assert all(f"`{key}`" in text for key in ENVELOPE)


def test_infinite_numbers_are_null_at_any_depth() -> None:
    assert as_json({"a": [1.5, math.inf, {"b": -math.inf}]}) == '{"a": [1.5, null, {"b": null}]}'


def test_table_aligns_columns() -> None:
    assert table(("op", "n"), [("rms_norm", "1"), ("add", "12")]) == "op        n\nrms_norm  1\nadd       12"
