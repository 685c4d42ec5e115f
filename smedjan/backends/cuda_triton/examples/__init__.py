"""Examples of every op at the shapes of real models: what is built ahead of time, budgeted and held to its roofline.

`X.py` has the examples of the rules in `cuda_triton/X.py`, and where one of its ops moves more than it must, why:
`EXPLAINED`, by the op's name.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from smedjan.backends.cuda_triton.examples.example import Example


@cache
def all_examples() -> tuple[Example, ...]:
    """`EXAMPLES` of every module here, by the module's name."""
    found = [example for module in _modules() for example in module.EXAMPLES]
    twice = {(one.op, one.name) for one in found if sum((one.op, one.name) == (e.op, e.name) for e in found) > 1}
    assert not twice, f"examples of one name: {sorted(twice)}"
    return tuple(found)


@cache
def explained() -> dict[str, str]:
    """op -> why it moves more than its minimum: `EXPLAINED` of every module that has one."""
    return {op: why for module in _modules() for op, why in getattr(module, "EXPLAINED", {}).items()}


def _modules() -> list[ModuleType]:
    names = sorted(module.name for module in iter_modules(__path__) if module.name != "example")
    return [import_module(f"{__name__}.{name}") for name in names]
