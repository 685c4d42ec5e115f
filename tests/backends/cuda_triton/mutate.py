"""Wrong kernels: a kernel's source with an edit, imported under another name. A test that passes with one is none."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

_numbers = itertools.count()


def mutated(module: ModuleType, edits: dict[str, str], folder: Path) -> ModuleType:
    """`module` with each key of `edits`, which it must contain, replaced by its value wherever it stands.

    A file, because triton reads a kernel's source from one.
    """
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    for old, new in edits.items():
        assert old in source, f"{module.__name__} has no {old!r}: the mutation is out of date"
        source = source.replace(old, new)
    name = f"{module.__name__.rpartition('.')[2]}_mutation_{next(_numbers)}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def fails(check: Callable[[], None]) -> bool:
    """Whether `check` finds a difference: raises AssertionError."""
    try:
        check()
    except AssertionError:
        return True
    return False
