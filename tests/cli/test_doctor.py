"""`diagnose` names each backend once, imports nothing heavy itself, and has a remedy for whatever is not usable."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from smedjan.cli import doctor
from smedjan.cli.doctor import BackendStatus, diagnose_with

CPU_ONLY = {"gpu": "", "capability": [], "built_for": ""}
HOPPER = {"gpu": "NVIDIA H100", "capability": [9, 0], "built_for": "12.8"}
COMPILED = {"built": True, "reason": "/usr/bin/cc", "detail": ""}
PINNED = {"torch": "2.13.0", "transformers": "5.23.0", "triton": "3.9.0", "mlx": "0.32.4"}


def statuses(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    torch: dict[str, object] | str = CPU_ONLY,
    mlx: dict[str, object] | str = "no mlx here",
    native: dict[str, object] | str = COMPILED,
) -> dict[str, BackendStatus]:
    """What `diagnose` finds where these versions are installed and the probes answer so (a text: they fail with it)."""

    def probe(code: str) -> tuple[dict[str, object] | None, str]:
        answer = native if "compile_kernels" in code else torch if "torch" in code else mlx
        return (None, answer) if isinstance(answer, str) else (answer, "")

    monkeypatch.setattr(doctor, "installed", versions.get)
    monkeypatch.setattr(doctor, "find_spec", lambda module: object() if module in versions else None)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = diagnose_with(probe)
    assert [status.name for status in found] == ["torch_reference", "cpu_native", "cuda_triton", "mlx_metal"]
    assert all(status.remedy for status in found if not status.usable)
    return {status.name: status for status in found}


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
    found = {
        status.name: status for status in diagnose_with(lambda code: ({**CPU_ONLY, **COMPILED, "metal": False}, ""))
    }
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
        "print(json.dumps([[s.name, s.usable] for s in found]));"
        "print(json.dumps(sorted({'torch', 'triton', 'mlx', 'transformers'} & set(sys.modules))))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    found, imported = (json.loads(line) for line in run.stdout.splitlines())
    assert dict(found)["torch_reference"] is True
    assert imported == []
