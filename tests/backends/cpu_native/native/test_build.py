"""The kernels are compiled once, by whichever process comes first, into a place that is ours alone; or aten runs."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from smedjan.backends.cpu_native import native
from smedjan.backends.cpu_native.native import build as builder
from smedjan.backends.cpu_native.native.build import SOURCES, compile_kernels, find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SMEDJAN_NATIVE", raising=False)
    # Nothing here computes, and without optimisation a library is there in a fifth of the time
    fake_compiler(tmp_path, f'exec {shlex.join(find_compiler() or [])} "$@" -O0', monkeypatch)
    return tmp_path / "smedjan" / "native"


def fake_compiler(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fakecc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))


def test_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compile_kernels()
    assert made.library is not None
    assert made.library.parent == cache.resolve()
    assert [path.name for path in cache.iterdir()] == [made.library.name]
    ctypes.CDLL(str(made.library)).smedjan_run  # noqa: B018  (AttributeError where it is not exported)
    monkeypatch.setattr(builder, "_compile", lambda *given, **options: pytest.fail("compiled again"))
    assert compile_kernels() == made


def test_other_sources_and_other_macros_are_other_libraries(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_compile", lambda command, path, **options: path)
    first, portable = compile_kernels(), compile_kernels(("SMEDJAN_PORTABLE",))
    edited = cache.parent / "src"
    edited.mkdir(parents=True)
    for path in SOURCES.glob("*.[ch]"):
        (edited / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(builder, "SOURCES", edited)
    assert compile_kernels() == first
    (edited / "tape.h").write_text((SOURCES / "tape.h").read_text() + "\n")
    assert len({str(each) for each in (first, portable, compile_kernels())}) == 3


def test_many_processes_at_once_make_one_library(cache: Path) -> None:
    path = SOURCES.parent / "build.py"
    made = f"import runpy, ctypes; made = runpy.run_path({str(path)!r})['compile_kernels']()"
    code = f"{made}; ctypes.CDLL(str(made.library)); print(made)"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(said) == 1
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("where", ["folder", "parent"])
def test_a_cache_that_others_may_write_to_is_not_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    good = compile_kernels()
    assert good.library is not None
    (cache if where == "folder" else tmp_path).chmod(0o777)
    made = compile_kernels()
    assert made.private
    assert made.library is not None
    assert cache not in made.library.parents
    assert made.library.parent.stat().st_mode & 0o077 == 0
    made.library.unlink()
    made.library.parent.rmdir()


def test_a_library_that_others_may_write_to_is_made_anew(cache: Path) -> None:
    made = compile_kernels()
    assert made.library is not None
    made.library.write_bytes(b"somebody else's")
    made.library.chmod(0o722)
    assert compile_kernels() == made
    assert made.library.read_bytes()[:4] == b"\x7fELF"


def test_no_compiler_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    assert compile_kernels() == builder.Build(library=None, reason="no compiler")
    assert not cache.exists()


def test_switched_off_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMEDJAN_NATIVE", "0")
    assert compile_kernels() == builder.Build(library=None, reason="SMEDJAN_NATIVE=0")


@pytest.mark.parametrize(
    "script",
    ["echo 'a.c:1: error: no' >&2; exit 1", 'case "$*" in *-dM*) ;; *) echo "a.c:1: error: no" >&2; exit 1;; esac'],
    ids=["at once", "at the sources"],
)
def test_a_compiler_that_fails_is_said_once_and_counts_as_none(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
) -> None:
    fake_compiler(tmp_path, script, monkeypatch)
    native._loaded.cache_clear()
    try:
        assert not native.available()
        assert not native.available()
        assert native.reason() == "the compiler fails"
    finally:
        native._loaded.cache_clear()
    assert capsys.readouterr().err == "cpu_native: the compiler fails, aten runs instead: a.c:1: error: no\n"
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_library_that_does_not_load_counts_as_none(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_compiler(tmp_path, 'for last; do :; done; while [ "$1" != -o ] && [ $# -gt 0 ]; do shift; done', monkeypatch)
    native._loaded.cache_clear()
    try:
        assert not native.available()  # the "compiler" left the file empty
    finally:
        native._loaded.cache_clear()
    assert "does not load" in capsys.readouterr().err


def test_the_package_has_the_sources() -> None:
    names = {path.name for path in SOURCES.iterdir()}
    assert {"tape.c", "tape.h", "embedding.c"} <= names
    assert os.path.commonpath([SOURCES, native.__file__]) == str(Path(native.__file__).parent)
