"""What a built kernel costs on the GPU, and the budget that it must keep.

`budgets.json`, beside this file, holds for each build (kernel, example, launch shape, architecture) the most registers
a thread may take, the most shared memory, and the fewest 128-bit accesses and tensor core instructions: a change that
spills, loses vectorised access or falls back to scalar products is seen on a machine without a GPU. Budgets are those
of one Triton release. Under another its code generator decides, and only what must hold everywhere is checked: no spill
on sm_90.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

BUDGETS = Path(__file__).with_name("budgets.json")

NO_SPILL_CC = 90
"""Compute capability on which no kernel may spill, under any Triton."""

REGISTER_STEP = 8
"""Registers are given to a warp in steps of 8 a thread, so that fewer than 8 more cost nothing: the budget's slack."""


AT_LEAST = ("wide_loads", "wide_stores", "products", "hopper_products")
"""What a budget bounds from below."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one kernel: registers a thread; spilled and shared bytes; instruction counts, None where no code was read."""

    registers: int
    spilled: int
    """Stack and local bytes a thread: registers that did not fit."""
    shared: int
    instructions: int | None = None
    wide_loads: int | None = None
    """Loads from global memory of 128 bits a thread (LDG.E.128, cp.async), and bulk copies (TMA)."""
    wide_stores: int | None = None
    products: int | None = None
    """Tensor core instructions, of whatever kind the architecture has."""
    hopper_products: int | None = None
    """HGMMA, Hopper's: a whole warp group's product from shared memory."""
    local_accesses: int | None = None
    """LDL and STL: accesses to spilled registers."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds for `Resources`: at most these registers and bytes, at least these instructions (None: any)."""

    registers: int
    spilled: int
    shared: int
    wide_loads: int | None = None
    wide_stores: int | None = None
    products: int | None = None
    hopper_products: int | None = None

    @classmethod
    def of(cls, found: Resources) -> Budget:
        """What was found, with registers rounded up to the step in which the hardware hands them out."""
        return cls(
            registers=-(-found.registers // REGISTER_STEP) * REGISTER_STEP,
            spilled=found.spilled,
            shared=found.shared,
            **{name: getattr(found, name) for name in AT_LEAST},
        )


def read(path: Path = BUDGETS) -> tuple[str, dict[str, Budget]]:
    """The Triton release for which the budgets hold, and they by the build's key."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return stored["triton"], {key: Budget(**budget) for key, budget in stored["budgets"].items()}


def write(release: str, found: Mapping[str, Resources], path: Path = BUDGETS) -> None:
    """Make what was found the budget."""
    budgets = {key: asdict(Budget.of(resources)) for key, resources in sorted(found.items())}
    given = {
        key: {name: bound for name, bound in budget.items() if bound is not None} for key, budget in budgets.items()
    }
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(budget)}" for key, budget in given.items())
    text = f'{{\n  "triton": {json.dumps(release)},\n  "budgets": {{\n{lines}\n  }}\n}}\n'
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def breaches(
    found: Mapping[str, Resources], budgets: Mapping[str, Budget], *, release: str, recorded_release: str
) -> list[str]:
    """One line for each bound that is broken, for each build without a budget, and for each budget without a build."""
    lines = [
        f"{key}: spills {resources.spilled} bytes a thread"
        for key, resources in found.items()
        if key.endswith(f"sm_{NO_SPILL_CC}") and (resources.spilled or resources.local_accesses)
    ]
    if release != recorded_release:
        return lines
    for key in sorted(found.keys() | budgets.keys()):
        if key not in budgets:
            lines.append(f"{key}: no budget")
        elif key not in found:
            lines.append(f"{key}: a budget, but no such build")
        else:
            lines += [f"{key}: {breach}" for breach in _compare(found[key], budgets[key])]
    return lines


def _compare(found: Resources, budget: Budget) -> list[str]:
    lines = []
    for name in ("registers", "spilled", "shared"):
        value, most = getattr(found, name), getattr(budget, name)
        if value > most:
            lines.append(f"{name} {value}, budget {most}")
    for name in AT_LEAST:
        value, least = getattr(found, name), getattr(budget, name)
        if value is not None and least is not None and value < least:
            lines.append(f"{name} {value}, budget at least {least}")
    return lines
