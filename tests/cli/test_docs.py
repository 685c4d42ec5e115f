"""The commands of docs/quickstart.md run, in their order, as they are written there; those of README.md do in
`test_first_hour`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from smedjan.cli import app

ROOT = Path(__file__).parents[2]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line]
    split = [shlex.split(line) for line in lines if not line.startswith("make ")]
    assert split, f"{page} shows no command"
    assert all(words[0] == "smedjan" for words in split)
    return [words[1:] for words in split]


def run(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> str:
    """What a command prints, run in this process: importing torch anew for each would take a minute."""
    patch.chdir(folder)
    code = app.run(words)
    printed = capsys.readouterr()
    assert code == 0, f"smedjan {shlex.join(words)}\n{printed.err}"
    return printed.out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the quickstart's Python has made its model and its rows."""
    made = tmp_path_factory.mktemp("docs")
    (script,) = blocks(ROOT / "docs" / "quickstart.md", "python")
    subprocess.run([sys.executable, "-c", script], cwd=made, check=True, capture_output=True, timeout=300)
    return made


def test_quickstart(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {}
    for words in commands(ROOT / "docs" / "quickstart.md"):
        printed[words[0]] = run(words, folder, capsys, monkeypatch)
    assert "0 is \u27e6even<end>\u27e7" in printed["data"]
    assert "64 kept, 0 truncated, 0 dropped, 0 broken" in printed["data"]
    assert (folder / "rows.html").read_text().startswith("<!doctype html>")
    assert "cases equal to the bit" in printed["parity"]
    assert "OUT OF" not in printed["parity"]
    assert (folder / "run" / "report.html").stat().st_size > 1000
    assert (folder / "merged" / "config.json").is_file()
    assert (folder / "parity.html").read_text().startswith("<!doctype html>")
    assert "2 of 2 equal to the bit" in printed["families"]
    assert (folder / "merged.gguf").read_bytes()[:4] == b"GGUF"
    assert (folder / "merged.Modelfile").read_text().startswith("FROM ./merged.gguf")


def test_laptops(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, small, doctor, first, second, legs = (
        run(words, folder, capsys, monkeypatch) for words in commands(ROOT / "docs" / "laptops.md")
    )
    assert "Macs       fits into one of 8 GB or more\n" in plan
    assert "1.5 MB available: does not fit" in small
    assert "would fit  --train.batch-size 4 --train.grad-accum 2: planned" in small
    assert "without --backend" in doctor
    assert "4 steps on mlx_metal" in first
    assert first.split("weights ")[1] == second.split("weights ")[1]
    assert "4 of 4 steps in 2 legs" in legs


def test_the_table_of_laptops_is_the_planners() -> None:
    from bench.laptops import table

    assert table() in (ROOT / "docs" / "laptops.md").read_text()


STEP = {
    *("step", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "tokens_per_s", "peak_bytes", "mfu", "eta_s"),
    *("skipped", "at"),
}
HEADER = {
    *("model", "trained", "lora", "rows", "steps", "optim", "seed", "backend", "device", "exact", "plan_hash"),
    *("memory", "peak", "versions", "config_hash", "data", "started", "began", "out", "machine", "processes"),
}
LEG = {
    *("machine", "system", "backend", "device", "exact", "plan_hash", "processes", "versions", "began", "ended"),
    *("steps", "again", "first_step", "last_step", "first_loss", "last_loss"),
}
PLAN = {"parameters", "nodes", "flops_per_token", "planned_bytes", "ops"}
DRY_RUN = PLAN | {"memory_available", "fits", "advice", "longest_row", "step_seconds", "batch", "fp8", "macs"}
TRAIN = ["finetune", "--model", "downloaded", "--data", "rows.jsonl", "--train.steps", "2", "--train.batch-size", "2"]


@pytest.mark.parametrize(
    ("words", "keys", "ran"),
    [
        (["info", "downloaded"], {"model_type", "parameters", "dtype", "tied", "adapter"}, False),
        (["graph", "downloaded", "--length", "16"], PLAN, True),
        (["graph", "downloaded", "--length", "16", "--decode", "--quantize", "int8"], PLAN, True),
        ([*TRAIN, "--dry-run"], DRY_RUN, True),
        (
            [*TRAIN, "--out", "json-run"],
            {
                *("run_dir", "weights_sha256", "rows", "trained_share", "converted"),
                *("skipped", "best_step", "best_eval_loss", "stopped_early"),
            },
            True,
        ),
        (
            ["generate", "downloaded", "7 is ", "--max-new-tokens", "2"],
            {"token_ids", "text", "finish_reason", "prompt_tokens", "tokens_per_s", "quantization"},
            True,
        ),
        (
            ["eval", "downloaded", "--data", "rows.jsonl", "--limit", "2", "--against", "downloaded"],
            {
                *("n", "task", "nll", "perplexity", "exact_match", "normalised_match", "contains", "f1", "accuracy"),
                *("accuracy_bytes", "accuracy_tokens", "ci95", "intervals", "baselines", "against", "answers"),
            },
            True,
        ),
        (
            ["import", "downloaded", "json-import"],
            {
                *("model_type", "parameters", "dtype", "source_quantization"),
                *("missing", "unexpected", "tied", "sources", "files", "notes"),
            },
            False,
        ),
        (
            ["export", "downloaded", "json.gguf", "--type", "F32"],
            {"out", "model_type", "architecture", "type", "parameters", "bytes", "types", "files", "notes"},
            False,
        ),
        (
            ["export", "downloaded", "json-mlx", "--to", "mlx", "--group-size", "32"],
            {"out", "model_type", "bits", "group_size", "parameters", "bytes", "types", "files", "notes"},
            False,
        ),
        (
            ["parity", "downloaded", "--dtype", "float32", "--attention", "eager"],
            {"model_type", "layers", "cases", "skipped", "html"},
            True,
        ),
        (["families", "--family", "gpt2"], {"rows", "skipped"}, True),
        (
            ["data", "inspect", "rows.jsonl", "--model", "downloaded"],
            {
                *("rows", "unstopped", "converted", "tokens", "trained_tokens", "trained_share", "longest", "lengths"),
                *("samples", "html"),
            },
            False,
        ),
    ],
    ids=[
        "info",
        "graph",
        "decode",
        "plan",
        "finetune",
        "generate",
        "eval",
        "import",
        "export",
        "export to mlx",
        "parity",
        "families",
        "data inspect",
    ],
)
def test_json_keys_are_frozen(
    words: list[str],
    keys: set[str],
    ran: bool,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys that scripts rely on: stdout is JSON alone, its last line the result, before it a header and steps."""
    lines = run([*words, "--json", "--backend", "torch_reference"], folder, capsys, monkeypatch).splitlines()
    *steps, result = [json.loads(line) for line in lines]
    command = " ".join(words[:2]) if words[0] == "data" else words[0]
    assert keys <= set(result)
    assert (result["schema"], result["command"], result["ok"], result["error"]) == (1, command, True, None)
    assert (result["backend"], result["exact"]) == (("torch_reference", True) if ran else (None, None))
    if "--out" in words:
        first = steps.pop(0)
        assert (set(first), set(first["header"])) == ({"step", "header"}, HEADER)
    assert len(steps) == (2 if "--out" in words else 0)
    assert all(set(step) >= STEP for step in steps)


def test_the_legs_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`run history` of a run that ended, and was told to go on; its keys are frozen too."""
    words = [*TRAIN, "--backend", "torch_reference", "--out", "legs"]
    run(words, folder, capsys, monkeypatch)
    run(["finetune", "--resume", "--out", "legs", "--backend", "cpu_native"], folder, capsys, monkeypatch)
    found = json.loads(run(["run", "history", "legs", "--json"], folder, capsys, monkeypatch))
    assert {"run_dir", "steps", "total_steps", "legs"} <= set(found)
    assert (found["command"], found["backend"], found["steps"], found["total_steps"]) == ("run history", None, 2, 2)
    first, second = found["legs"]
    assert set(first) == set(second) == LEG
    assert (first["backend"], first["first_step"], first["last_step"]) == ("torch_reference", 1, 2)
    assert (second["backend"], second["steps"], second["ended"]) == ("cpu_native", 0, None)
    assert first["began"] <= first["ended"] <= second["began"]
    shown = run(["run", "history", "legs"], folder, capsys, monkeypatch).splitlines()
    assert shown[0] == "legs: 2 of 2 steps in 2 legs"
    assert shown[2].startswith("1-2")


def test_launches_of_a_name_in_both_programs_are_added(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from smedjan.train import plan

    once, words = plan.step_of, ["graph", "downloaded", "--length", "16", "--json", "--backend", "cuda_triton"]
    single = json.loads(run(words, folder, capsys, monkeypatch))["launches"]
    monkeypatch.setattr(plan, "step_of", lambda *given, **options: [*once(*given, **options)] * 2)
    double = json.loads(run(words, folder, capsys, monkeypatch))["launches"]
    assert double == {name: 2 * count for name, count in single.items()}


def test_quickstart_toml_is_a_run(folder: Path) -> None:
    from smedjan.train.config import FinetuneConfig

    (text,) = blocks(ROOT / "docs" / "quickstart.md", "toml")
    (folder / "run.toml").write_text(text)
    config = FinetuneConfig.from_toml(folder / "run.toml")
    assert (config.model, config.train.steps, config.learning_rate) == ("tiny", 8, 1e-3)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/cli.md", "docs/laptops.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
