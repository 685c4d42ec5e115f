"""`diagnose` names each backend once, imports nothing heavy itself, and has a remedy for whatever is not usable."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from smedjan.cli import doctor
from smedjan.cli.doctor import BackendStatus, Diagnosis, diagnose_with
from smedjan.cli.mlx_wheels import Machine, this_machine

CPU_ONLY = {"gpu": "", "capability": [], "built_for": ""}
HOPPER = {"gpu": "NVIDIA H100", "capability": [9, 0], "built_for": "12.8"}
COMPILED = {"built": True, "reason": "/usr/bin/cc", "detail": ""}
PINNED = {"torch": "2.13.0", "transformers": "5.23.0", "triton": "3.9.0", "mlx": "0.32.4"}


LINUX = Machine(system="Linux", processor="x86_64", version=(2, 39))
MAC = Machine(system="Darwin", processor="arm64", version=(15, 1))


def diagnosis(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    torch: dict[str, object] | str = CPU_ONLY,
    mlx: dict[str, object] | str = "no mlx here",
    native: dict[str, object] | str = COMPILED,
    machine: Machine = LINUX,
) -> Diagnosis:
    """What `diagnose` finds where these versions are installed and the probes answer so (a text: they fail with it)."""

    def probe(code: str) -> tuple[dict[str, object] | None, str]:
        answer = native if "compile_kernels" in code else torch if "torch" in code else mlx
        return (None, answer) if isinstance(answer, str) else (answer, "")

    monkeypatch.setattr(doctor, "installed", versions.get)
    monkeypatch.setattr(doctor, "find_spec", lambda module: object() if module in versions else None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = diagnose_with(probe, machine)
    found = made.backends
    assert [status.name for status in found] == ["torch_reference", "cpu_native", "cuda_triton", "mlx_metal"]
    assert all(status.remedy for status in found if not status.usable)
    return made


def statuses(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], **more: Any) -> dict[str, BackendStatus]:
    return {status.name: status for status in diagnosis(monkeypatch, versions, **more).backends}


def test_nothing_installed_is_four_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    found = statuses(monkeypatch, {})
    assert not any(status.usable for status in found.values())
    assert found["torch_reference"].remedy == 'pip install "torch>=2.11,<2.14"'
    assert found["mlx_metal"].remedy == 'pip install "smedjan[mlx]"'


def test_the_pinned_pair_is_exact_and_another_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(monkeypatch, PINNED)["torch_reference"].reason.startswith("exact to the bit")
    other = statuses(monkeypatch, {**PINNED, "torch": "2.12.1"})["torch_reference"]
    assert other.usable
    assert "proven for torch 2.13.0" in other.reason


@pytest.mark.parametrize(
    ("package", "version", "backend", "usable"),
    [
        ("torch", "2.10.1", "cpu_native", False),
        ("torch", "2.11.0", "cpu_native", True),
        ("torch", "2.13.5+cpu", "cpu_native", True),
        ("torch", "2.14.0", "cpu_native", False),
        ("torch", "3.0.0", "cpu_native", False),
        ("triton", "3.5.1", "cuda_triton", False),
        ("triton", "3.6.0", "cuda_triton", True),
        ("triton", "3.10.0", "cuda_triton", False),
        ("transformers", "4.57.0", "torch_reference", False),
        ("transformers", "5.19.0", "torch_reference", False),
        ("transformers", "5.99.0", "torch_reference", True),
        ("transformers", "6.0.0", "torch_reference", False),
        ("mlx", "0.31.9", "mlx_metal", False),
        ("mlx", "1.0.0", "mlx_metal", True),
    ],
)
def test_supported_ranges(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, backend: str, usable: bool
) -> None:
    found = statuses(monkeypatch, {**PINNED, package: version}, torch=HOPPER, mlx={"metal": False})[backend]
    assert found.usable is usable
    if not usable:
        assert f"{package} {version} is outside the tested versions" in found.reason


@pytest.mark.parametrize(
    ("torch", "usable", "said"),
    [
        (HOPPER, True, "NVIDIA H100 (sm_90), triton 3.9.0, CUDA 12.8"),
        ({**HOPPER, "gpu": "Tesla V100", "capability": [7, 0]}, False, "sm_70, the kernels need sm_80"),
        ({**CPU_ONLY, "built_for": "12.8"}, False, "torch sees no NVIDIA GPU"),
        (CPU_ONLY, False, "built without CUDA"),
    ],
)
def test_triton_depends_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, torch: dict[str, object], usable: bool, said: str
) -> None:
    found = statuses(monkeypatch, PINNED, torch=torch)["cuda_triton"]
    assert found.usable is usable
    assert said in found.reason


def test_tritons_interpreter_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses(monkeypatch, PINNED)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = diagnose_with(lambda code: ({**CPU_ONLY, **COMPILED, "metal": False}, ""), LINUX)
    found = {status.name: status for status in made.backends}
    assert made.auto.name == "cpu_native", "the interpreter is for tests"
    assert found["cuda_triton"].usable
    assert "interpreter" in found["cuda_triton"].reason


@pytest.mark.parametrize(
    ("native", "said", "remedy"),
    [
        (COMPILED, "kernels compiled by /usr/bin/cc", None),
        ({"built": False, "reason": "no compiler", "detail": ""}, "no compiled kernels: no compiler", "install a C"),
        (
            {"built": False, "reason": "the compiler fails", "detail": "a.c:1:\n error"},
            "the compiler fails",
            "a.c:1: err",
        ),
    ],
)
def test_cpu_native_says_what_compiled_its_kernels(
    monkeypatch: pytest.MonkeyPatch, native: dict[str, object], said: str, remedy: str | None
) -> None:
    found = statuses(monkeypatch, PINNED, native=native)["cpu_native"]
    assert found.usable
    assert said in found.reason
    assert (found.remedy is None) if remedy is None else (remedy in (found.remedy or ""))


def test_a_broken_library_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = statuses(monkeypatch, PINNED, torch="OSError: libtorch.so: cannot open", mlx="ImportError: libmlx.so")
    for name in ("torch_reference", "cpu_native", "cuda_triton"):
        assert not found[name].usable
        assert "torch does not import: OSError: libtorch.so" in found[name].reason
    assert found["mlx_metal"].reason == "mlx does not import: ImportError: libmlx.so"


@pytest.mark.parametrize(("metal", "said"), [(True, "Metal"), (False, "CPU build")])
def test_mlx_says_which_build(monkeypatch: pytest.MonkeyPatch, metal: bool, said: str) -> None:
    assert said in statuses(monkeypatch, PINNED, mlx={"metal": metal})["mlx_metal"].reason


def test_a_probe_answers_or_says_why_not() -> None:
    assert doctor.ask_interpreter("print('noise'); print('{\"a\": 1}')") == ({"a": 1}, "")
    assert doctor.ask_interpreter("raise RuntimeError('broken')") == (None, "RuntimeError: broken")


def test_diagnose_here_imports_nothing_heavy() -> None:
    code = (
        "import sys, json; from smedjan.cli.doctor import diagnose; found = diagnose();"
        "print(json.dumps([[s.name, s.usable] for s in found.backends]));"
        "print(json.dumps(sorted({'torch', 'triton', 'mlx', 'transformers'} & set(sys.modules))))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    found, imported = (json.loads(line) for line in run.stdout.splitlines())
    assert dict(found)["torch_reference"] is True
    assert imported == []


NO_WHEELS = {
    "rosetta": (
        Machine(system="Darwin", processor="x86_64", version=(14, 5), translated=True),
        "run by Rosetta",
        "/opt/homebrew/bin/python3 -m venv .venv, then pip install",
    ),
    "intel": (Machine(system="Darwin", processor="x86_64", version=(13, 6)), "Intel processor", "another machine"),
    "macOS 13": (
        Machine(system="Darwin", processor="arm64", version=(13, 6, 1)),
        "need macOS 14 or newer, this is 13.6.1",
        "update macOS, then pip install",
    ),
    "old Python": (Machine(system="Darwin", processor="arm64", version=(10, 16)), "before 11", "python3 -m venv"),
    "Windows": (Machine(system="Windows", processor="AMD64"), "this is Windows", "wsl --install"),
    "musl": (Machine(system="Linux", processor="x86_64"), "another C library", "--backend cpu_native"),
    "old glibc": (Machine(system="Linux", processor="aarch64", version=(2, 31)), "2.35 or newer, this is 2.31", "cpu"),
    "riscv": (Machine(system="Linux", processor="riscv64", version=(2, 39)), "no wheels for riscv64", "cpu_native"),
}


@pytest.mark.parametrize("name", NO_WHEELS)
def test_machines_without_a_wheel_of_mlx(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Said where mlx is not installed; one that is there, and computes, was built for the machine."""
    machine, reason, remedy = NO_WHEELS[name]
    without = {package: version for package, version in PINNED.items() if package != "mlx"}
    found = statuses(monkeypatch, without, machine=machine)["mlx_metal"]
    assert found.reason.startswith("mlx is not installed; ")
    assert reason in found.reason
    assert remedy in (found.remedy or "")
    assert statuses(monkeypatch, PINNED, mlx={"metal": True}, machine=machine)["mlx_metal"].usable
    broken = statuses(monkeypatch, PINNED, mlx="ImportError: libmlx.dylib", machine=machine)["mlx_metal"]
    assert broken.reason.startswith("mlx does not import: ImportError: libmlx.dylib; ")
    assert reason in broken.reason


@pytest.mark.parametrize(
    "machine",
    [
        LINUX,
        MAC,
        Machine(system="Darwin", processor="arm64", version=(14, 0)),
        Machine(system="Darwin", processor="arm64", version=(26, 1)),
        Machine(system="Linux", processor="aarch64", version=(2, 35)),
    ],
)
def test_machines_with_one(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    found = statuses(monkeypatch, {}, machine=machine)["mlx_metal"]
    assert (found.reason, found.remedy) == ("mlx is not installed", doctor.MLX.install)


@pytest.mark.parametrize(
    ("versions", "facts", "name", "usable", "said"),
    [
        (PINNED, {}, "cpu_native", True, "no NVIDIA GPU with triton"),
        (PINNED, {"torch": HOPPER}, "cuda_triton", True, "torch sees an NVIDIA GPU"),
        (PINNED, {"machine": MAC, "mlx": {"metal": True}}, "mlx_metal", True, "MLX is installed"),
        (PINNED, {"machine": MAC, "mlx": "ImportError: x"}, "mlx_metal", False, "but mlx does not import"),
        ({**PINNED, "triton": "3.1.0"}, {"torch": HOPPER}, "cuda_triton", False, "but triton 3.1.0 is outside"),
        ({}, {}, "cpu_native", False, "but torch is not installed"),
        ({"torch": "2.13.0"}, {"torch": HOPPER}, "cpu_native", True, "no NVIDIA GPU with triton"),
    ],
)
def test_what_runs_without_a_backend_and_why(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], facts: Any, name: str, usable: bool, said: str
) -> None:
    auto = diagnosis(monkeypatch, versions, **facts).auto
    assert (auto.name, auto.usable) == (name, usable)
    assert said in auto.reason
    assert auto.usable or auto.remedy


def test_facts_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.5", ("", "", ""), "x86_64"))
    answers = subprocess.CompletedProcess([], 0, stdout="1\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_given, **_options: answers)
    assert this_machine() == Machine(system="Darwin", processor="x86_64", version=(14, 5), translated=True)
    answers.stdout = ""
    assert this_machine().translated is False


@pytest.mark.skipif(platform.system() != "Linux", reason="of glibc")
def test_facts_of_this_machine() -> None:
    assert this_machine().version == tuple(map(int, platform.libc_ver()[1].split(".")))


@pytest.mark.parametrize("hidden", [("mlx",), ("triton",), ("mlx", "triton")], ids="+".join)
def test_an_environment_without_them(tmp_path: Path, hidden: tuple[str, ...]) -> None:
    """A real one, with links to every package but those: what runs, why, and the one command for what does not."""
    venv.create(tmp_path / "env", symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if not entry.name.startswith((*hidden, "__editable__", "__pycache__")):
            (site / entry.name).symlink_to(entry)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(doctor.__file__).parents[2])

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "env" / "bin" / "python"), "-m", "smedjan", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    found = {status["name"]: status for status in made["backends"]}
    assert found["torch_reference"]["usable"]
    assert (made["auto"]["usable"], made["versions"].keys() & {"mlx", "triton"}) == (
        True,
        {"mlx", "triton"} - {*hidden},
    )
    remedies = {"mlx": ("mlx_metal", doctor.MLX.install), "triton": ("cuda_triton", doctor.TRITON.install)}
    for package, (name, command) in remedies.items():
        if package in hidden:
            assert found[name] == {
                "name": name,
                "usable": False,
                "reason": f"{package} is not installed",
                "remedy": command,
            }
            asked = run("finetune", "--model", "m", "--data", "d", "--dry-run", "--backend", name)
            assert (asked.returncode, asked.stderr.count("\n")) == (2, 1)
