"""Launch shapes as data: `tuned.json`, keyed by architecture, kernel and shape class.

    {"sm_90": {"attention_fwd": {"128 bf16": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}}}}

An entry is what a launch takes: constexpr parameters and options. An architecture without a table takes the one below.
Where a library has a kernel too, "KERNEL_choice" holds {"library": NAME}: "triton" until another was measured faster.
Nothing is tuned at run time; a launch shape changes with this file alone, and every one in it is built ahead of time.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

from smedjan.backends.cuda_triton.kernels import common
from smedjan.errors import BackendError

DEFAULT = 90
"""The architecture whose shapes run where there is none: in Triton's interpreter, and on meta arrays."""

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""A dtype's name in a shape class."""

_assumed: ContextVar[int | None] = ContextVar("architecture", default=None)

Shape = dict[str, Any]


@cache
def table() -> Mapping[int, Mapping[str, Mapping[str, Shape]]]:
    """{capability: {kernel: {shape class: options}}}"""
    text = (importlib.resources.files("smedjan.backends.cuda_triton") / "tuned.json").read_text()
    return {int(name.removeprefix("sm_")): kernels for name, kernels in json.loads(text).items()}


@contextmanager
def architecture(capability: int) -> Iterator[None]:
    """Inside, launches are written down for this compute capability (times ten), whatever is in the machine."""
    token = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(token)


@cache
def _present() -> int:
    if common.INTERPRETED.value or not torch.cuda.is_available():
        return DEFAULT
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _tabled(kernel: str, capability: int | None) -> int:
    wanted = capability or _assumed.get() or _present()
    below = max((known for known in table() if known <= wanted), default=None)
    if below is None:
        raise BackendError(f"no launch shapes for sm_{wanted}", field=kernel, remedy="add the table to tuned.json")
    return below


def has(kernel: str, shape_class: str, *, capability: int | None = None) -> bool:
    """Whether there is such an entry: what a rule asks where an architecture may want other kernels for the same."""
    return shape_class in table()[_tabled(kernel, capability)].get(kernel, {})


def options(kernel: str, shape_class: str, *, capability: int | None = None) -> Shape:
    """The launch shape of `kernel` for `shape_class`, with what every launch states.

    capability   of this architecture; else the one of `architecture`, the GPU's, or `DEFAULT`
    """
    below = _tabled(kernel, capability)
    found = table()[below].get(kernel, {}).get(shape_class)
    if found is None:
        raise BackendError(
            f"no launch shape of {kernel} for {shape_class!r} on sm_{below}",
            field=kernel,
            remedy="add the entry to tuned.json",
        )
    # Stated, because Triton 3.10 turns its default off.
    return {**found, "enable_fp_fusion": True}


def library(kernel: str, shape_class: str) -> str:
    """Whose kernel runs: "triton", or the library that was measured to be the best there is. In the interpreter it is
    Triton's: no other runs without a GPU."""
    if common.INTERPRETED.value and _assumed.get() is None:
        return "triton"
    return options(f"{kernel}_choice", shape_class)["library"]
