"""Small compiled kernels: what aten has no single pass for. `available()` is what a rule's `supports=` asks.

Without a compiler, or with SMEDJAN_NATIVE=0, there are none: aten runs, and the plan's labels say so. A compiler that
fails is said once on stderr and counts as none.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from functools import cache

from smedjan.backends.cpu_native.native.build import Build, compile_kernels


@cache
def _loaded() -> tuple[ctypes.CDLL | None, Build]:
    made = compile_kernels()
    library = None
    if made.library is not None:
        try:
            library = ctypes.CDLL(str(made.library))
        except OSError as error:
            made = Build(library=None, reason="the library does not load", detail=str(error))
        if made.private and made.library is not None:
            shutil.rmtree(made.library.parent)  # it stays mapped
    if library is None and made.detail:
        first = next((line.strip() for line in made.detail.splitlines() if "error" in line), made.detail.strip())
        print(f"cpu_native: {made.reason}, aten runs instead: {first}", file=sys.stderr, flush=True)
    return library, made


def available() -> bool:
    """Whether there are compiled kernels. Compiles them when first asked; later answers cost nothing."""
    return _loaded()[0] is not None


def reason() -> str:
    """The compiler's path, or, in a few words, why there are no kernels."""
    return _loaded()[1].reason


def library() -> ctypes.CDLL:
    """The loaded library. For callers that have asked `available`."""
    found = _loaded()[0]
    assert found is not None, "no compiled kernels here"
    return found
