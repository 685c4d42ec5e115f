"""Machine code as nvdisasm prints it: which instructions there are, which stand in loops, what they move.

The tools (`cuobjdump`, `nvdisasm`) come with the triton package: no CUDA and no GPU is needed.

    /*0210*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;

A global access moves its width (32 bits where none is written) for each thread whose predicate holds. Bulk copies (TMA)
move a tile for one thread; what they move is in their descriptor, not in the code.
"""

from __future__ import annotations

import importlib.resources
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from smedjan.errors import BackendError

LINE = re.compile(r"^\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);")
LABEL = re.compile(r"^(?P<name>\.L_x?_?\w+):")
TARGET = re.compile(r"`\((?P<name>\.L_x?_?\w+)\)")
WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)(?![0-9])")
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}

LOADS = ("LDG", "LDGSTS")
STORES = ("STG",)
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
BULK_LOADS, BULK_STORES = ("UTMALDG", "UBLKCP"), ("UTMASTG", "UTMAREDG")
LOCAL = ("LDL", "STL")
PRODUCTS = ("HGMMA", "HMMA", "IMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "OMMA", "QMMA", "DMMA")
"""Tensor core instructions: HGMMA is Hopper's, UTCHMMA Blackwell's, HMMA everybody's."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `depth` counts the loops around it, `guarded` says that a predicate may skip it."""

    address: int
    opcode: str
    operands: str
    guarded: bool
    depth: int

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def width(self) -> int:
        """Bytes that each thread moves."""
        found = WIDTH.search(self.opcode)
        return BYTES[found[1]] if found else 4


@dataclass(frozen=True, slots=True)
class Code:
    """A kernel's instructions, in order."""

    instructions: tuple[Instruction, ...]

    def named(self, names: Iterable[str]) -> list[Instruction]:
        wanted = frozenset(names)
        return [one for one in self.instructions if one.name in wanted]

    def count(self, *names: str) -> int:
        return len(self.named(names))

    def wide(self, *names: str) -> int:
        """How many of them move 128 bits or more a thread."""
        return sum(one.width >= 16 for one in self.named(names))

    @property
    def loops(self) -> int:
        """The deepest nesting."""
        return max((one.depth for one in self.instructions), default=0)

    @property
    def straight(self) -> bool:
        """Whether every thread runs every instruction once, but for predicates: neither a loop nor a branch around a
        global access."""
        branches = [one for one in self.instructions if one.name in ("BRA", "BRX", "JMP", "CALL")]
        moved = self.named((*LOADS, *STORES, *ATOMICS))
        end = max((one.address for one in moved), default=0)
        return all(one.address > end for one in branches)

    def bytes(self, names: Iterable[str], *, threads: int) -> int:
        """What one program of a straight kernel moves when no predicate skips anything."""
        return sum(one.width for one in self.named(names)) * threads


def parse(text: str) -> Code:
    """nvdisasm -c of one kernel."""
    lines: list[tuple[int, str, str, bool]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if found := LABEL.match(line):
            waiting.append(found["name"])
        elif found := LINE.match(line):
            address = int(found["at"], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            lines.append((address, found["opcode"], found["rest"].strip(), found["guard"] is not None))
    loops = []
    for address, opcode, rest, _ in lines:
        target = TARGET.search(rest)
        if opcode.startswith("BRA") and target and target["name"] in labels and labels[target["name"]] < address:
            loops.append((labels[target["name"]], address))
    return Code(
        tuple(
            Instruction(address, opcode, rest, guarded, sum(first <= address <= last for first, last in loops))
            for address, opcode, rest, guarded in lines
        )
    )


def tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools in the triton package."""
    path = importlib.resources.files("triton.backends.nvidia") / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"{name} failed: {done.stderr.strip()}", file=str(path), remedy="reinstall triton")
    return done.stdout


def usage(cubin: bytes) -> dict[str, int]:
    """Resource usage by cuobjdump: REG, STACK, SHARED, LOCAL."""
    with _file(cubin) as file:
        found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", file))
    return {name: int(value) for name, value in found}


def disassemble(cubin: bytes) -> Code:
    with _file(cubin) as file:
        return parse(tool("nvdisasm", "-c", file))


@contextmanager
def _file(cubin: bytes) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        yield str(file)
