"""Kernels with a fault put in: a bound that such a kernel does not break would hold nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def edited(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module with one place of its source replaced; a file of its own, since Triton reads a kernel's source."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    file = folder / f"{module.__name__.rpartition('.')[2]}_edited.py"
    file.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{file.stem}_{abs(hash((old, new)))}", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
