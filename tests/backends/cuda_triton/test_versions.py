"""Kernels are written in the language of Triton 3.6, the oldest that is supported; the tests run under one release.

`triton_3_6.json` is what `triton.language` of 3.6.0 has: each public name and, of a function, its parameters, as
`inspect.signature` gives them. Those that begin with an underscore are left out: the compiler fills them.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from smedjan.backends.cuda_triton import kernels

LANGUAGE = json.loads((Path(__file__).parent / "triton_3_6.json").read_text(encoding="utf-8"))

KERNELS = sorted(path for path in Path(kernels.__file__).parent.glob("*.py") if path.name != "__init__.py")

FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)
"""Else a number that is not 0 is a float64 in 3.6 and 3.7, and makes one of what it meets."""


def language(node: ast.AST) -> str | None:
    """ "load" of `tl.load`"""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tl":
        return node.attr
    return None


def unknown(source: str) -> list[str]:
    """What of `tl` in a kernel's source 3.6 has not: names, arguments and numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = language(node)
        if name is not None and name not in LANGUAGE:
            found.append(f"{node.lineno}: tl.{name}")  # type: ignore[attr-defined]
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            magnitude = abs(node.value)
            if magnitude not in (0.0, float("inf")) and not FLOAT32[0] <= magnitude <= FLOAT32[1]:
                found.append(f"{node.lineno}: {node.value}")
        if isinstance(node, ast.Call) and (called := language(node.func)) is not None:
            parameters = LANGUAGE.get(called)
            if parameters is None:
                continue
            given = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
            # trans, reshape and permute take a shape's numbers one by one, too.
            if called not in ("trans", "reshape", "permute") and len(node.args) > len(parameters):
                found.append(f"{node.lineno}: tl.{called} of {len(node.args)} arguments")
            found += [f"{node.lineno}: tl.{called}({name}=)" for name in given if name not in parameters]
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_use_what_the_oldest_triton_has(path):
    assert unknown(path.read_text(encoding="utf-8")) == []


def test_what_came_later_is_seen():
    source = "import triton.language as tl\n\nx = tl.load(p, mask=m, other=0.0)\n"
    assert unknown(source) == []
    assert unknown(source + "y = tl.atomic_poll(p)\n") == ["4: tl.atomic_poll"]
    assert unknown(source + "y = tl.load(p, policy=q)\n") == ["4: tl.load(policy=)"]
    assert unknown(source + "y = tl.rsqrt(x, x)\n") == ["4: tl.rsqrt of 2 arguments"]
    assert unknown(source + "y = tl.maximum(x, 1e-40)\n") == ["4: 1e-40"]
