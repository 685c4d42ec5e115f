"""The C kernels of `src/`, compiled by the machine's own compiler when they are first asked for.

The library lies in the user's cache, `$XDG_CACHE_HOME/smedjan/native` (`~/.cache`), under a hash of the sources, the
command and all that the compiler predefines for this CPU: its version and the CPU's vector extensions. It is written
under another name and renamed, so that any number of processes may compile at once. A cache that others could write to
is never read: the library is then built in a private folder, for this process alone.

Standard library only: `smedjan doctor` asks without importing torch.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
SWITCH = "SMEDJAN_NATIVE"
"""Environment variable: 0 compiles nothing, and aten runs everything."""

# Sums that say so (omp simd) may be reordered, as every vectorised sum is; nothing else, and NaN stays NaN.
FLAGS = (
    *("-std=c11", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-ffp-contract=fast", "-Wall", "-Wno-psabi"),
)
TARGETS = (("-march=native",), ("-mcpu=native",), ())
"""How compilers are told to use all of this CPU; the first that one takes."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """`library` is the compiled file, or None, and then `reason` says why, in a few words; `detail` is what the
    compiler complained of. A `private` library is deleted by whoever has loaded it."""

    library: Path | None
    reason: str
    detail: str = ""
    private: bool = False


def find_compiler() -> list[str] | None:
    """`$CC` where it is set, else cc, gcc or clang, whichever there is."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    return None


def compile_kernels(defines: tuple[str, ...] = ()) -> Build:
    """The library, from the cache or compiled now. `defines` are macros: SMEDJAN_PORTABLE leaves out intrinsics."""
    if os.environ.get(SWITCH, "1") == "0":
        return Build(library=None, reason=f"{SWITCH}=0")
    if os.name != "posix":
        return Build(library=None, reason="no POSIX threads")
    compiler = find_compiler()
    if compiler is None:
        return Build(library=None, reason="no compiler")
    target, predefined, detail = _target(compiler)
    if predefined is None:
        return Build(library=None, reason="the compiler fails", detail=detail)
    command = [*compiler, *FLAGS, *target, *(f"-D{name}" for name in defines)]
    name = f"{_key(command, predefined)}.so"
    folder = _cache()
    if folder is None:
        return _compile(command, Path(tempfile.mkdtemp(prefix="smedjan-")) / name, private=True)
    path = folder / name
    if path.is_file() and _own(path):
        return Build(library=path, reason=compiler[0])
    return _compile(command, path)


def _target(compiler: list[str]) -> tuple[tuple[str, ...], bytes | None, str]:
    """The flags that choose this CPU, the macros that the compiler predefines with them, or its complaint."""
    detail = ""
    for flags in TARGETS:
        done = _run([*compiler, *flags, "-E", "-dM", "-x", "c", os.devnull])
        if done.returncode == 0:
            return flags, done.stdout, ""
        detail = done.stderr.decode(errors="replace")
    return (), None, detail


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=300, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, b"", str(error).encode())


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.c"))


def _key(command: list[str], predefined: bytes) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    digest.update(predefined)
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _compile(command: list[str], path: Path, *, private: bool = False) -> Build:
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        done = _run([*command, "-o", str(scratch), *map(str, sources()), "-lm"])
        if done.returncode != 0:
            return Build(library=None, reason="the compiler fails", detail=done.stderr.decode(errors="replace"))
        scratch.chmod(0o700)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
        if private and not path.is_file():
            path.parent.rmdir()
    return Build(library=path, reason=command[0], private=private)


def _cache() -> Path | None:
    """Our folder of the user's cache, or None where it cannot be made or others could write to it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    folder = root / "smedjan" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        where = folder.resolve()
    except (OSError, RuntimeError):
        return None
    safe = _own(where) and os.access(where, os.W_OK) and all(_guarded(parent) for parent in where.parents)
    return where if safe else None


def _own(path: Path) -> bool:
    """Ours, and nobody else may write to it."""
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _guarded(folder: Path) -> bool:
    """Nobody but its owner, who is us or root, can replace what is ours in it."""
    found = folder.stat()
    if found.st_uid not in (0, os.getuid()):
        return False
    return not found.st_mode & stat.S_IWOTH or bool(found.st_mode & stat.S_ISVTX)
