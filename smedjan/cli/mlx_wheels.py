"""Which machines MLX has wheels for: what its install page and its files on PyPI ask for, as a function of facts.

Apple silicon, macOS 14 or newer, an arm64 Python (https://ml-explore.github.io/mlx/build/html/install.html; the last
wheel for macOS 13 is 0.29.3); on Linux, where MLX computes on CPUs, glibc 2.35 or newer.
"""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass

MACOS, GLIBC = (14,), (2, 35)

COMPATIBLE = (10, 16)
"""What macOS 11 and newer say of themselves to a Python that was built for an older one."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """system      Darwin, Linux, Windows, as `platform.system` has it
    processor      of the running Python, not of the machine: arm64, aarch64, x86_64
    version        of macOS, or of glibc; empty where it is another C library
    translated     an Intel Python that Rosetta runs on Apple silicon
    """

    system: str
    processor: str
    version: tuple[int, ...] = ()
    translated: bool = False


def problem(machine: Machine, install: str) -> tuple[str, str] | None:
    """(reason, remedy) where no wheel of MLX fits the machine and its Python; None where `install` finds one."""
    found = ".".join(map(str, machine.version))
    if machine.system == "Darwin":
        if machine.processor != "arm64" and machine.translated:
            return (
                "this Python is an Intel one, run by Rosetta: MLX needs an arm64 one",
                f"make the environment anew: /opt/homebrew/bin/python3 -m venv .venv, then {install}",
            )
        if machine.processor != "arm64":
            return (
                "MLX needs Apple silicon, this Mac has an Intel processor",
                "use another machine: torch has no wheels either",
            )
        if machine.version[:2] == COMPATIBLE:
            return (
                "this Python was built for a macOS before 11, and pip finds no wheels for it",
                f"make the environment anew: /opt/homebrew/bin/python3 -m venv .venv, then {install}",
            )
        if machine.version and machine.version < MACOS:
            return f"MLX's wheels need macOS 14 or newer, this is {found}", f"update macOS, then {install}"
        return None
    if machine.system != "Linux":
        return f"MLX runs on macOS and Linux, this is {machine.system}", "run smedjan in WSL 2: wsl --install"
    if machine.processor not in ("x86_64", "aarch64", "arm64"):
        return f"MLX has no wheels for {machine.processor}", "use --backend cpu_native here"
    if not machine.version:
        return "MLX's wheels need glibc, this Linux has another C library", "use --backend cpu_native here"
    if machine.version < GLIBC:
        return f"MLX's wheels need glibc 2.35 or newer, this is {found}", "use --backend cpu_native here"
    return None


def this_machine() -> Machine:
    system = platform.system()
    if system == "Darwin":
        version = numbers(platform.mac_ver()[0])
        return Machine(system=system, processor=platform.machine(), version=version, translated=_translated())
    library, found = platform.libc_ver() if system == "Linux" else ("", "")
    return Machine(system=system, processor=platform.machine(), version=numbers(found) if library == "glibc" else ())


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _translated() -> bool:
    """Apple's own question, https://developer.apple.com/documentation/apple-silicon/about-the-rosetta-translation-environment;
    an Intel Mac does not know it."""
    asked = subprocess.run(["sysctl", "-n", "sysctl.proc_translated"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() == "1"
