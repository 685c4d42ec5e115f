"""Python's garbage collector, off while a graph is built and planned.

Tens of thousands of nodes and places are made at once, and all of them stay: each of the collector's passes over them,
and over all that the libraries hold, would free nothing. They were a third of the time of a plan.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_gc() -> Iterator[None]:
    """No pass of the collector within; it is as it was behind. May be nested."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.collect(0)  # of the new objects alone, which are old ones from here on
            gc.enable()
