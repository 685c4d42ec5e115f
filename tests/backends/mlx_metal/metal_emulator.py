"""Metal kernels run on the CPU from the source that MLX would compile, and held to the limits of M1 to M4.

MLX writes the source itself: a function that calls a kernel can be exported where there is no Metal, and what it writes
for Metal's compiler lies in the file. Here address spaces become types, attributes go, and g++ compiles what is left
against `metal_shim.h`, which says what is emulated and what is found out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from smedjan.backends.mlx_metal import backend as mlx_backend
from smedjan.backends.mlx_metal.elementwise import NAMES
from smedjan.backends.mlx_metal.kernels.common import SIMD, Device, Kernel, Launch
from smedjan.checkpoint.raw import ITEMSIZE, RawTensor

MAX_THREADS = 1024
MAX_THREADGROUP_BYTES = 32 << 10
MAX_BUFFERS = 31
"""Apple, "Metal Feature Set Tables", columns Apple7 (M1), Apple8 (M2), Apple9 (M3, M4): maximum threads per
threadgroup, maximum total threadgroup memory allocation, maximum entries in the buffer argument table."""

ABSENT = re.compile(r"\b(double|float64_t|long double|atomic\w*|goto|new|virtual|dynamic_cast|typeid|throw)\b")
"""Not in the language (Metal Shading Language Specification, sections 1.4.4 and 2.1), but for atomics: with them the
order of a sum, and its bits, would be the scheduler's."""

SHIM, RUNTIME = (Path(__file__).with_name(f"metal_shim.{suffix}") for suffix in ("h", "cpp"))
FOLDER = Path(tempfile.gettempdir()) / f"smedjan-metal-{os.getuid()}"
POINTER = re.compile(r"\b(const\s+)?(device|constant|threadgroup)\s+(const\s+)?(\w+)\s*\*")
ARRAY = re.compile(r"\bthreadgroup\s+(\w+)\s+(\w+)\[([^\]]+)\];")
SIZES = {"float": 4, "int": 4, "uint": 4, "half": 2, "bfloat": 2, "bool": 1, "uchar": 1}

BACKEND = mlx_backend()


class MetalError(AssertionError):
    """What a kernel does that a GPU need not survive."""


@dataclass
class Emulator(Device):
    """In place of `common.DEVICE`: kernels are the rules, and run here. `seed` draws the functions' errors, `order` the
    threads' order."""

    seed: int = 0
    order: int = 1
    launched: list[tuple[Kernel, Launch]] = field(default_factory=list)

    def has_metal(self) -> bool:
        return True

    def run(self, kernel: Kernel, launch: Launch) -> list[mx.array]:
        if _traced(launch.inputs):
            return super().run(kernel, launch)  # a plan asks MLX for its primitives: nothing is computed
        self.launched.append((kernel, launch))
        source = source_of(kernel, launch)
        check_limits(source, launch)
        return _run(source, launch, self.seed, self.order)


def _traced(arrays: Sequence[mx.array]) -> bool:
    """Whether MLX is exporting or compiling the function that has these."""
    try:
        mx.eval(list(arrays))
    except ValueError as error:
        if "function transformations" not in str(error):
            raise
        return True
    return False


@dataclass
class Recorder(Device):
    """In place of `common.DEVICE`, to see what is launched for arrays of any size: MLX is lazy, nothing is computed."""

    launched: list[tuple[Kernel, Launch]] = field(default_factory=list)

    def has_metal(self) -> bool:
        return True

    def run(self, kernel: Kernel, launch: Launch) -> list[mx.array]:
        self.launched.append((kernel, launch))
        return [mx.zeros(shape, dtype) for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True)]


_sources: dict[Any, str] = {}


def source_of(kernel: Kernel, launch: Launch) -> str:
    """The whole text that MLX gives to Metal's compiler, but for its own utilities before it."""
    kinds = tuple((x.dtype, x.ndim == 0, x.size < 8) for x in launch.inputs)
    key = (kernel, launch.template, kinds, launch.dtypes)
    if key not in _sources:
        arrays = [mx.zeros(x.shape, dtype=x.dtype) for x in launch.inputs]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "made.mlxfn"
            mx.export_function(str(path), lambda *given: Device().run(kernel, replace(launch, inputs=given)), *arrays)
            data = path.read_bytes()
        at = data.index(b"[[kernel]] void custom_kernel_")
        start = data.rindex(kernel.header.encode(), 0, at) if kernel.header else data.rindex(b"\0", 0, at) + 1
        size = int.from_bytes(data[start - 8 : start], "little")
        _sources[key] = data[start : start + size].decode()
    return _sources[key]


def threadgroup_bytes(source: str) -> int:
    """Of the arrays that a kernel declares; their lengths are numbers or constants of the source."""
    found = re.findall(r"\bconstexpr (?:const )?int (\w+) = (\d+);", source)
    constants = {name: int(value) for name, value in found}
    total = 0
    for kind, _, length in ARRAY.findall(source):
        factors = [constants.get(word.strip()) or int(word) for word in length.split("*")]
        total += SIZES[kind] * prod(factors)
    return total


def check_limits(source: str, launch: Launch) -> None:
    """What Metal's compiler or a dispatch on M1 to M4 would refuse, or what hangs on the GPU that runs it."""
    threads, shared = launch.threads, threadgroup_bytes(source)
    if threads > MAX_THREADS or threads % SIMD:
        raise MetalError(f"{threads} threads a threadgroup: at most {MAX_THREADS}, and whole simdgroups of {SIMD}")
    if min(launch.groups) < 1 or max(launch.grid) >= 1 << 32:
        raise MetalError(f"a grid of {launch.groups} threadgroups")
    if shared > MAX_THREADGROUP_BYTES:
        raise MetalError(f"{shared} bytes of threadgroup memory, at most {MAX_THREADGROUP_BYTES}")
    buffers = len(re.findall(r"\[\[buffer\(\d+\)\]\]", source))
    if buffers > MAX_BUFFERS:
        raise MetalError(f"{buffers} buffers, at most {MAX_BUFFERS}")
    code = re.sub(r"//.*", "", source)
    absent = ABSENT.search(code)
    if absent is not None:
        raise MetalError(f"{absent.group()!r} in a kernel")
    wide = re.search(r"(?<![\w.])\d+\.\d*(?:[eE][-+]?\d+)?(?![\w.])", code)
    if wide is not None:
        raise MetalError(f"{wide.group()!r} is a number without f")


def translated(source: str) -> str:
    """The kernel as C++ over `metal_shim.h`, and the function that launches it."""
    head = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", source, re.DOTALL)
    assert head is not None, "no kernel in the source"
    name, parameters = head.group(1), [each.strip() for each in head.group(2).split(",\n")]
    instance = re.search(r"decltype\((\w+<[^;]*>)\) ", source)
    call = instance.group(1) if instance else name
    arguments, buffers = [], []
    for parameter in parameters:
        array = re.fullmatch(r"(const )?(device|constant) (\w+)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]", parameter)
        if array is None:
            attribute = re.fullmatch(r"\w+ (\w+) \[\[\1\]\]", parameter)
            assert attribute is not None, parameter
            arguments.append(ATTRIBUTES[attribute.group(1)])
            continue
        const, space, kind, by, label, index = array.groups()
        buffers.append((label, kind, const is None))
        assert int(index) == len(buffers) - 1
        if by == "&":
            arguments.append(f"*reinterpret_cast<const {kind}*>(buffers[{index}].low)")
        else:
            value = f"emulator::Pointer<emulator::{space}, {const or ''}{kind}>"
            arguments.append(f"{value}(reinterpret_cast<{kind}*>(buffers[{index}].low), &buffers[{index}])")
    made = ", ".join(f'{{"{label}", sizeof({kind}), {str(out).lower()}}}' for label, kind, out in buffers)
    text = ARRAY.sub(r"THREADGROUP_ARRAY(\1, \2, \3);", source)
    text = text.replace("static constant constexpr const ", "static constexpr ")
    text = POINTER.sub(lambda m: f"emulator::Pointer<emulator::{m[2]}, {'const ' if m[1] or m[3] else ''}{m[4]}>", text)
    text = re.sub(r"\bconst constant (\w+)&", r"const \1&", text)
    text = re.sub(r"\bthread (?=\w+\*)", "", text)
    text = re.sub(r" ?\[\[\w+(?:\([^)]*\))?\]\]", "", text)
    return f"""#include "{SHIM}"
{text}
static void run_thread(uint thread) {{
  using namespace emulator;
  {call}({", ".join(arguments)});
}}
extern "C" int launch(void** data, const int64_t* bytes, const uint* groups, uint threads, uint seed, uint order,
                      char* message) {{
  static const emulator::Argument arguments[] = {{{made}}};
  return emulator::launch(run_thread, arguments, {len(buffers)}, data, bytes, groups, threads, seed, order, message);
}}
"""


ATTRIBUTES = {
    "thread_position_in_threadgroup": "uint3{thread, 0, 0}",
    "thread_index_in_threadgroup": "thread",
    "thread_position_in_grid": "uint3{group[0] * threads_in_group + thread, group[1], group[2]}",
    "threadgroup_position_in_grid": "uint3{group[0], group[1], group[2]}",
    "threadgroups_per_grid": "uint3{groups[0], groups[1], groups[2]}",
    "threads_per_threadgroup": "uint3{threads_in_group, 1, 1}",
    "thread_index_in_simdgroup": "thread % SIMD_WIDTH",
    "simdgroup_index_in_threadgroup": "thread / SIMD_WIDTH",
    "simdgroups_per_threadgroup": "threads_in_group / SIMD_WIDTH",
}

FLAGS = ("-std=c++17", "-ffp-contract=off", "-fPIC", "-w")
_libraries: dict[str, Any] = {}


def _built(name: str, *arguments: str) -> Path:
    """A file that g++ made: once, whichever test process comes first."""
    path = FOLDER / name
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as build:
            made = Path(build) / name
            done = subprocess.run(["g++", *FLAGS, *arguments, "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise MetalError(f"{done.stderr[:2000]}")
            made.replace(path)
    return path


def _named(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def compiled(source: str) -> Any:
    """The launching function of a kernel."""
    text, shims = translated(source), [path.read_text() for path in (SHIM, RUNTIME)]
    name = _named(text, *shims)
    if name not in _libraries:
        runtime = _built(f"{_named(*shims)}.o", "-O2", "-c", str(RUNTIME))
        with tempfile.NamedTemporaryFile("w", suffix=".cpp") as code:
            code.write(text)
            code.flush()
            path = _built(f"{name}.so", "-shared", code.name, str(runtime))
        _libraries[name] = ctypes.CDLL(str(path)).launch
    return _libraries[name]


def _run(source: str, launch: Launch, seed: int, order: int) -> list[mx.array]:
    """The outputs. An array that does not start where its memory does is copied, as `ensure_row_contiguous` says."""
    arguments: dict[str, bytes] = {}
    labels = re.findall(r"[*&] (\w+) \[\[buffer\(\d+\)\]\]", source)
    given = iter(labels)
    for number, x in enumerate(launch.inputs):
        label = next(given)
        # An array that a kernel reads by its strides may lie in memory in any order of its dims: in a drawn one.
        axes = list(range(x.ndim))
        if f"{label}_strides" in labels:
            random.Random(seed + order + number).shuffle(axes)
        arguments[label] = BACKEND.to_raw(x.transpose(*axes) if x.ndim else x).data.tobytes()
        lies = {axis: prod(x.shape[other] for other in axes[place + 1 :]) for place, axis in enumerate(axes)}
        facts = {
            "shape": struct.pack(f"{x.ndim}i", *x.shape),
            "strides": struct.pack(f"{x.ndim}q", *(lies[axis] for axis in range(x.ndim))),
            "ndim": struct.pack("i", x.ndim),
        }
        for suffix, value in facts.items():
            if f"{label}_{suffix}" in labels:
                arguments[next(given)] = value
    sizes = [prod(shape) * ITEMSIZE[NAMES[dtype]] for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True)]
    memory = [ctypes.create_string_buffer(value, len(value)) for value in arguments.values()]
    made = [ctypes.create_string_buffer(b"\xff" * size, size) for size in sizes]
    every = [*memory, *made]
    assert len(every) == len(labels), f"{labels} for {len(every)} buffers"
    data = (ctypes.c_void_p * len(every))(*(ctypes.addressof(each) for each in every))
    count = (ctypes.c_int64 * len(every))(*(len(each) for each in every))
    message = ctypes.create_string_buffer(256)
    groups = (ctypes.c_uint32 * 3)(*launch.groups)
    if compiled(source)(data, count, groups, launch.threads, seed, order, message):
        raise MetalError(message.value.decode())
    return [
        BACKEND.from_raw(RawTensor(dtype=NAMES[dtype], shape=shape, data=memoryview(bytearray(each.raw))))
        for each, shape, dtype in zip(made, launch.shapes, launch.dtypes, strict=True)
    ]
