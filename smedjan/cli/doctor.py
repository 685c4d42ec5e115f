"""`smedjan doctor`: which backends can run here, and what to do about those that cannot.

Versions are read from the installed metadata. Whether a library imports, and what device it sees, is asked of a fresh
interpreter: a broken installation then is a finding instead of a crash, and this process imports neither torch nor mlx.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from smedjan.cli import mlx_wheels
from smedjan.cli.mlx_wheels import Machine
from smedjan.runtime.select import automatic


@dataclass(frozen=True, kw_only=True)
class BackendStatus:
    """`reason` says why the backend is usable or not, `remedy` what to do (None where nothing needs doing)."""

    name: str
    usable: bool
    reason: str
    remedy: str | None


@dataclass(frozen=True, kw_only=True)
class Supported:
    """A distribution, what it is imported as, and the versions that are tested: `low` and up, `high` included.

    Bounds compare the leading numbers alone: a high of (5,) takes every 5.x, and () takes whatever is newer.
    """

    package: str
    module: str
    low: tuple[int, ...]
    high: tuple[int, ...]
    install: str

    @property
    def range(self) -> str:
        low, high = (".".join(map(str, bound)) for bound in (self.low, self.high))
        return f"{low} to {high}.x" if high else f"{low} or newer"


TORCH = Supported(package="torch", module="torch", low=(2, 11), high=(2, 13), install='pip install "torch>=2.11,<2.14"')
TRITON = Supported(
    package="triton", module="triton", low=(3, 6), high=(3, 9), install='pip install "triton>=3.6,<3.10"'
)
TRANSFORMERS = Supported(
    package="transformers", module="transformers", low=(5, 20), high=(5,), install='pip install "transformers>=5.20,<6"'
)
MLX = Supported(package="mlx", module="mlx", low=(0, 32), high=(), install='pip install "smedjan[mlx]"')

PROVEN = {"torch": "2.13.0", "transformers": "5.23.0"}
"""The pair for which equality to the bit is a contract; elsewhere it is a bound."""

_TORCH_PROBE = """
import json, torch
gpu = torch.cuda.is_available()
print(json.dumps({
    "gpu": torch.cuda.get_device_name(0) if gpu else "",
    "capability": list(torch.cuda.get_device_capability(0)) if gpu else [],
    "built_for": torch.version.cuda or "",
}))
"""
_MLX_PROBE = """
import json, mlx.core as mx
mx.eval(mx.ones(1) + 1)
print(json.dumps({"metal": mx.metal.is_available()}))
"""

# The file by its path, since its package imports torch.
_NATIVE = Path(__file__).parents[1] / "backends" / "cpu_native" / "native" / "build.py"
_NATIVE_PROBE = f"""
import json, runpy
made = runpy.run_path({str(_NATIVE)!r})["compile_kernels"]()
print(json.dumps({{"built": made.library is not None, "reason": made.reason, "detail": made.detail.strip()[:200]}}))
"""

Report = dict[str, object]
Probe = Callable[[str], tuple[Report | None, str]]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One status a backend, and that of `auto`: which of them runs where no --backend is given, and why."""

    backends: list[BackendStatus]
    auto: BackendStatus


def diagnose() -> Diagnosis:
    """Takes some seconds: torch and mlx are imported once each, in another process."""
    return diagnose_with(ask_interpreter, mlx_wheels.this_machine())


def diagnose_with(probe: Probe, machine: Machine) -> Diagnosis:
    """`diagnose`, with the way to run a probe and the machine given."""
    problem = _problem(TORCH)
    torch, failure = (None, "") if problem else probe(_TORCH_PROBE)
    if torch is None and problem is None:
        problem = (f"torch does not import: {failure}", f"reinstall it: {TORCH.install} --force-reinstall")
    found = [
        _torch_reference(problem),
        _cpu_native(problem, probe),
        _cuda_triton(problem, torch or {}, machine),
        _mlx_metal(probe, machine),
    ]
    return Diagnosis(backends=found, auto=_auto(found, machine, torch or {}))


def ask_interpreter(code: str) -> tuple[Report | None, str]:
    """What `code` prints as JSON in a fresh interpreter, or None and the last line of its complaint."""
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return None, "no answer within 120 s"
    if run.returncode != 0:
        complaint = run.stderr.strip().splitlines()
        return None, complaint[-1] if complaint else f"exit status {run.returncode}"
    return json.loads(run.stdout.strip().splitlines()[-1]), ""


def installed(package: str) -> str | None:
    """The version of a distribution, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _problem(need: Supported) -> tuple[str, str] | None:
    """(reason, remedy) where a library is absent or of an untested version, else None."""
    found = installed(need.package)
    if found is None or find_spec(need.module) is None:
        return f"{need.package} is not installed", need.install
    numbers = tuple(int(part) for part in re.findall(r"\d+", found.split("+")[0]))
    if numbers[: len(need.low)] < need.low or numbers[: len(need.high)] > need.high:
        return f"{need.package} {found} is outside the tested versions, {need.range}", need.install
    return None


def _torch_reference(problem: tuple[str, str] | None) -> BackendStatus:
    name = "torch_reference"
    problem = problem or _problem(TRANSFORMERS)
    if problem:
        return BackendStatus(name=name, usable=False, reason=problem[0], remedy=problem[1])
    have = {package: (installed(package) or "").split("+")[0] for package in PROVEN}
    pair = " and ".join(f"{package} {number}" for package, number in have.items())
    if have == PROVEN:
        return BackendStatus(name=name, usable=True, reason=f"exact to the bit with {pair}", remedy=None)
    proven = " and ".join(f"{package} {number}" for package, number in PROVEN.items())
    return BackendStatus(
        name=name, usable=True, reason=f"{pair}: equality to the bit is proven for {proven} only", remedy=None
    )


def _cpu_native(problem: tuple[str, str] | None, probe: Probe) -> BackendStatus:
    name = "cpu_native"
    if problem:
        return BackendStatus(name=name, usable=False, reason=problem[0], remedy=problem[1])
    kernels, remedy = _native(probe)
    reason = f"torch {installed('torch')}, {_cores()} cores, {kernels}"
    return BackendStatus(name=name, usable=True, reason=reason, remedy=remedy)


def _native(probe: Probe) -> tuple[str, str | None]:
    """What compiled the kernels of cpu_native, and what to do where nothing did. Compiles them if need be."""
    made, failure = probe(_NATIVE_PROBE)
    if made is None:
        return f"no compiled kernels: {failure}", None
    if made["built"]:
        return f"kernels compiled by {made['reason']}", None
    remedy = str(made["detail"]) or "for faster ones install a C compiler (apt install gcc, xcode-select --install)"
    return f"no compiled kernels: {made['reason']}", " ".join(remedy.split())


def _cuda_triton(problem: tuple[str, str] | None, torch: Report, machine: Machine) -> BackendStatus:
    name = "cuda_triton"
    if machine.system != "Linux":
        reason = f"Triton runs on Linux, this is {machine.system}"
        return BackendStatus(name=name, usable=False, reason=reason, remedy="use another backend here")
    problem = problem or _problem(TRITON)
    if problem:
        return BackendStatus(name=name, usable=False, reason=problem[0], remedy=problem[1])
    triton = f"triton {installed('triton')}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        reason = f"{triton} in its interpreter (TRITON_INTERPRET=1), on the CPU: right, and very slow"
        return BackendStatus(name=name, usable=True, reason=reason, remedy=None)
    if not torch["built_for"]:
        return BackendStatus(
            name=name,
            usable=False,
            reason="this torch is built without CUDA",
            remedy=f"on a machine with an NVIDIA GPU, {TORCH.install} from the index of a CUDA build",
        )
    if not torch["gpu"]:
        return BackendStatus(
            name=name,
            usable=False,
            reason="torch sees no NVIDIA GPU",
            remedy="run `nvidia-smi`: it says whether driver and GPU are there",
        )
    major, minor = (int(part) for part in torch["capability"])  # type: ignore[attr-defined]
    if major < 8:
        reason = f"{torch['gpu']} is sm_{major}{minor}, the kernels need sm_80 or newer"
        return BackendStatus(name=name, usable=False, reason=reason, remedy="use --backend torch_reference")
    return BackendStatus(
        name=name,
        usable=True,
        reason=f"{torch['gpu']} (sm_{major}{minor}), {triton}, CUDA {torch['built_for']}",
        remedy=None,
    )


def _mlx_metal(probe: Probe, machine: Machine) -> BackendStatus:
    name = "mlx_metal"
    no_wheel = mlx_wheels.problem(machine, MLX.install)
    # What is there was built for this machine, perhaps from source: it is asked, and no list of wheels
    problem = _problem(MLX)
    if problem is None:
        mlx, failure = probe(_MLX_PROBE)
        if mlx is not None:
            build = "Metal" if mlx["metal"] else "the CPU build, about 3 GFLOP/s: for tiny models"
            return BackendStatus(name=name, usable=True, reason=f"mlx {installed('mlx')}, {build}", remedy=None)
        problem = (f"mlx does not import: {failure}", MLX.install)
    reason, remedy = problem
    if no_wheel is not None:
        reason, remedy = f"{reason}; {no_wheel[0]}", no_wheel[1]
    return BackendStatus(name=name, usable=False, reason=reason, remedy=remedy)


def _auto(found: Sequence[BackendStatus], machine: Machine, torch: Report) -> BackendStatus:
    """By what `runtime.select` looks at, so that it is also said where that would pick a backend which is broken."""
    here = {package: find_spec(package) is not None for package in ("mlx", "triton")}
    name, why = automatic(mlx=machine.system == "Darwin" and here["mlx"], gpu=here["triton"] and bool(torch.get("gpu")))
    status = next(status for status in found if status.name == name)
    reason = why if status.usable else f"{why}, but {status.reason}"
    return BackendStatus(name=name, usable=status.usable, reason=reason, remedy=status.remedy)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
