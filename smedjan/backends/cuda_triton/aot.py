"""Ahead-of-time builds of every Triton kernel, on a machine without a GPU, and what they cost.

`python -m smedjan.backends.cuda_triton.aot` builds each kernel as the examples' launches start it (`examples/`; a test
sees to it that they ask for every entry of `tuned.json`) for sm_80 (A100), sm_90 (H100), sm_100 (B200) and sm_120 (RTX
50). It prints registers, spills, shared memory and, for sm_90, tensor core instructions and 128-bit accesses, and fails
where a budget is broken; `--update` makes what it found the budget. `--roofline` prints the table of `roofline`
instead, or puts it in `--write FILE`: bench/kernels.md.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from smedjan.backends.cuda_triton import budgets, roofline, sass
from smedjan.backends.cuda_triton.budgets import Resources
from smedjan.backends.cuda_triton.examples import Example, all_examples, explained
from smedjan.backends.cuda_triton.record import record
from smedjan.backends.planned.launch import Launch
from smedjan.errors import BackendError

CAPABILITIES = (80, 90, 100, 120)
"""Compute capabilities built for, times ten."""

SASS_CAPABILITY = 90
"""The one whose machine code is read: that takes longer than building it, and its access widths are the same on the
others."""

KERNELS = "smedjan.backends.cuda_triton.kernels."


@dataclass(frozen=True, kw_only=True)
class Build:
    """One kernel as a launch wants it, specialised as Triton does at the launch.

    kernel      module and function under `kernels/`: "norm.rms_norm_fwd"
    example     the first example that starts it so
    signature   parameter -> Triton's type, "constexpr" for what is built in: also integers that are 1, and None
    constants   path of each constexpr parameter -> its value
    divisible   paths of the pointers and integers that are multiples of 16
    options     num_warps, num_stages, ...
    cc          compute capability
    """

    kernel: str
    example: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], str], ...]
    options: tuple[tuple[str, Any], ...]
    cc: int

    @property
    def shape(self) -> str:
        """Its constexpr parameters and options: "ACT=silu COLS=1024 num_warps=4"."""
        names = [name for name, _ in self.signature]
        named = {names[path[0]]: value for path, value in self.constants if len(path) == 1}
        told = {name: value for name, value in named.items() if name.isupper()} | dict(self.options)
        return " ".join(f"{name}={value}" for name, value in told.items() if name != "enable_fp_fusion")

    @property
    def key(self) -> str:
        return f"{self.kernel} | {self.example} | {self.shape} | sm_{self.cc}"

    @property
    def what(self) -> tuple[Any, ...]:
        """Equal for two builds of one binary."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return self.kernel, self.cc, *(repr(part) for part in parts)


def build_of(launch: Launch, example: str, cc: int) -> Build:
    """What Triton would compile at this launch: its own binder and specialisation, on arrays without memory.

    A meta array's address is its offset in the array that it is a view of, so that alignment is what it will be.
    """
    kernel = launch.function
    if not isinstance(kernel, triton.JITFunction):
        raise BackendError(
            "kernels cannot be built while Triton interprets them", field="TRITON_INTERPRET", remedy="unset it"
        )
    backend = make_backend(GPUTarget("cuda", cc, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.constants)
    _, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, specialization, options)
    return Build(
        kernel=f"{kernel.__module__.removeprefix(KERNELS)}.{kernel.__name__}",
        example=example,
        signature=tuple(signature.items()),
        constants=tuple(constants.items()),
        attributes=tuple((path, repr(given)) for path, given in attributes.items() if given),
        options=tuple(sorted(options.items())),
        cc=cc,
    )


def builds(examples: Iterable[Example] | None = None, capabilities: Iterable[int] = CAPABILITIES) -> list[Build]:
    """Each kernel that the examples' launches start, once for each way in which it is specialised."""
    chosen = all_examples() if examples is None else tuple(examples)
    found: dict[tuple[Any, ...], Build] = {}
    for cc in capabilities:
        for example in chosen:
            for launch in record(example, capability=cc).launches:
                if launch.grid:
                    build = build_of(launch, f"{example.op} {example.name}", cc)
                    found.setdefault(build.what, build)
    return list(_distinct(found.values()))


def _distinct(found: Iterable[Build]) -> Iterator[Build]:
    """An example may start a kernel twice with one shape and other arguments: the second one is numbered."""
    seen: dict[str, int] = {}
    for build in found:
        times = seen[build.key] = seen.get(build.key, 0) + 1
        yield build if times == 1 else replace(build, example=f"{build.example} ({times})")


def compiled(build: Build) -> CompiledKernel:
    """Down to a cubin."""
    module, name = build.kernel.rsplit(".", 1)
    kernel = getattr(importlib.import_module(KERNELS + module), name)
    backend = make_backend(GPUTarget("cuda", build.cc, 32))
    attributes = {path: backend.parse_attr("D") for path, _ in build.attributes}
    source = ASTSource(kernel, signature=dict(build.signature), constexprs=dict(build.constants), attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", build.cc, 32), options=dict(build.options))


def measure(build: Build) -> Resources:
    """Build, and read what was built."""
    made = compiled(build)
    cubin = made.asm["cubin"]
    usage = sass.usage(cubin)
    # The cubin's own SHARED is static memory and the hardware's reserve: Triton's is asked for at the launch.
    found = Resources(registers=usage["REG"], spilled=usage["STACK"] + usage["LOCAL"], shared=made.metadata.shared)
    if build.cc != SASS_CAPABILITY:
        return found
    read = sass.disassemble(cubin)
    return replace(
        found,
        instructions=len(read.instructions),
        wide_loads=read.wide(*sass.LOADS) + read.count(*sass.BULK_LOADS),
        wide_stores=read.wide(*sass.STORES) + read.count(*sass.BULK_STORES),
        products=read.count(*sass.PRODUCTS),
        hopper_products=read.count("HGMMA"),
        local_accesses=read.count(*sass.LOCAL),
    )


def measure_all(chosen: Sequence[Build]) -> dict[str, Resources]:
    """`measure` each, by its key."""
    return {build.key: one for build, one in zip(chosen, _map(measure, chosen), strict=True)}


def _map(function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
    """In as many processes as there are processors; a few builds take less time than starting those."""
    if len(columns[0]) <= 8:
        return list(map(function, *columns))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, *columns, chunksize=4))


COLUMNS = ("registers", "spilled", "shared", "instructions", "tensor core", "HGMMA", "128-bit loads", "128-bit stores")


def _table(found: Mapping[str, Resources]) -> Table:
    table = Table(title=f"Triton {triton.__version__}, built ahead of time", header_style="bold")
    for column in ("build", *COLUMNS):
        table.add_column(column, justify="left" if column == "build" else "right", no_wrap=column != "build")
    for key, row in found.items():
        counts = (row.registers, row.spilled, row.shared, row.instructions, row.products, row.hopper_products)
        table.add_row(key, *("" if one is None else str(one) for one in (*counts, row.wide_loads, row.wide_stores)))
    return table


def code_bytes(build: Build, programs: int) -> int | None:
    """What a launch of this many programs loads and stores by its machine code; None where code loops or branches."""
    made = compiled(build)
    code = sass.disassemble(made.asm["cubin"])
    if not code.straight or code.count(*sass.BULK_LOADS, *sass.BULK_STORES):
        return None
    threads = 32 * made.metadata.num_warps
    return programs * code.bytes((*sass.LOADS, *sass.STORES, *sass.ATOMICS), threads=threads)


def codes(examples: Sequence[Example], cc: int = roofline.CAPABILITY) -> list[int | None]:
    """For each example the bytes of its launches by their machine code, None where one of them has no such figure."""
    launches = [record(example, capability=cc).launches for example in examples]
    wanted = [
        (index, build_of(launch, "", cc), prod(launch.grid))
        for index, calls in enumerate(launches)
        for launch in calls
        if all(call.grid for call in calls)
    ]
    found = _map(code_bytes, [build for _, build, _ in wanted], [programs for *_, programs in wanted])
    totals: dict[int, int | None] = {}
    for (index, *_), bytes_ in zip(wanted, found, strict=True):
        before = totals.get(index, 0)
        totals[index] = None if bytes_ is None or before is None else before + bytes_
    return [totals.get(index) for index in range(len(examples))]


def roofline_table() -> tuple[str, list[str]]:
    """The table of `roofline`, and the examples that move more than they must with nobody saying why.

    Accesses are counted where Triton interprets its kernels: in a process of its own.
    """
    command = [sys.executable, "-m", roofline.__name__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    counted = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines, missing = [], []
    for found, bytes_ in zip(roofline.load(counted.stdout), codes(all_examples()), strict=True):
        why = explained().get(found.op, "")
        if roofline.needs_why(found) and not why:
            missing.append(
                f"{found.op} {found.name}: moved {found.moved:.2f}, requested {found.requested:.2f}, no reason"
            )
        lines.append(roofline.row(found, why, None if bytes_ is None else bytes_ / found.minimum))
    return roofline.HEADER + "\n".join(lines) + "\n", missing


def main() -> int:
    """Build everything, print the table, check or renew the budgets. 0: all keep theirs; 1: some do not; 2: cannot."""
    parser = argparse.ArgumentParser(prog="python -m smedjan.backends.cuda_triton.aot", description=__doc__)
    parser.add_argument("--update", action="store_true", help="make what was found the budget")
    parser.add_argument("--roofline", action="store_true", help="bytes against each op's minimum, in place of builds")
    parser.add_argument("--write", metavar="FILE", type=Path, help="where to put the table of --roofline")
    given = parser.parse_args()
    # Not as narrow as a pipe claims to be: the tables are also read in logs.
    console = Console(width=180)
    try:
        broken = _roofline(console, given.write) if given.roofline else _budgets(console, update=given.update)
    except BackendError as error:
        print(error, file=sys.stderr)
        return 2
    for line in broken:
        console.print(line, style="red", highlight=False)
    return 1 if broken else 0


def _roofline(console: Console, file: Path | None) -> list[str]:
    text, missing = roofline_table()
    if file is None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    else:
        file.write_text(text, encoding="utf-8")
    return missing


def _budgets(console: Console, *, update: bool) -> list[str]:
    found = measure_all(builds())
    console.print(_table(found), highlight=False)
    if update:
        budgets.write(triton.__version__, found)
        console.print(f"wrote {len(found)} budgets to {budgets.BUDGETS.name}")
    recorded_release, recorded = budgets.read()
    if recorded_release != triton.__version__:
        console.print(f"budgets are for triton {recorded_release}: only spills on sm_{budgets.NO_SPILL_CC} are checked")
    return budgets.breaches(found, recorded, release=triton.__version__, recorded_release=recorded_release)


if __name__ == "__main__":
    raise SystemExit(main())
