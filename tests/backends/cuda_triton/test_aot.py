"""Every kernel is built for four architectures, as its rule starts it, and keeps its budget.

The builds run in a process of their own, since this one may interpret its kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from inspect import getmembers
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from smedjan.backends.cuda_triton import aot, budgets, kernels, sass, tuned
from smedjan.backends.cuda_triton.examples import Example, all_examples
from smedjan.backends.cuda_triton.examples.example import array
from smedjan.backends.cuda_triton.record import record
from smedjan.errors import BackendError

HOME = Path(kernels.__file__).parent

NARROW = {
    "attention.document_bounds",
    "attention_bwd.attention_bwd_sinks",
    "decode.attention_join",
    "embedding.rank",
    "loss.sum_losses",
    "optimizer.clip_coefficient",
    "optimizer.root_of_sum",
    "rope_tables.position_count",
}
"""Kernels of a few thousand values, wherever they lie: ids, positions, partial sums."""

SCRIPT = """
import json, sys
from dataclasses import asdict
from smedjan.backends.cuda_triton import aot
from smedjan.backends.cuda_triton.examples import all_examples

def chosen(builds):
    seen = set()
    for build in builds:
        if (build.cc == 90 and sys.argv[1] == "all") or (build.kernel, build.cc) not in seen:
            yield build
        seen.add((build.kernel, build.cc))

if __name__ == "__main__":
    builds = aot.builds()
    found = aot.measure_all(list(chosen(builds)))
    print(json.dumps([[build.key for build in builds], {key: asdict(one) for key, one in found.items()}]))
"""
"""One build of each kernel and architecture, or all for sm_90: `make kernels` makes them all."""


def script(folder: Path, text: str, *arguments: str) -> Any:
    """What `text` prints, run where Triton compiles its kernels."""
    file = folder / "build.py"
    file.write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(file), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


Built = dict[str, budgets.Resources]


def build(folder: Path, which: str) -> tuple[list[str], Built]:
    keys, found = script(folder, SCRIPT, which)
    return keys, {key: budgets.Resources(**one) for key, one in found.items()}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Built]:
    return build(tmp_path_factory.mktemp("aot"), "one")


def check(built: Built) -> None:
    """Nothing spills on sm_90, every kernel there moves 16 bytes at a time, and all keep their budgets."""
    hopper = {key: found for key, found in built.items() if key.endswith("sm_90")}
    assert [key for key, found in hopper.items() if found.spilled or found.local_accesses] == []
    for key, found in hopper.items():
        few = key.split(" ")[0] in NARROW or " COLS=1 " in key
        assert found.wide_loads or found.wide_stores or few, f"{key} has no 128-bit access"
    release, recorded = budgets.read()
    of_these = {key: budget for key, budget in recorded.items() if key in built}
    assert budgets.breaches(built, of_these, release=triton.__version__, recorded_release=release) == []


def test_every_kernel_builds_for_every_architecture(builds):
    made = defaultdict(set)
    for key in builds[1]:
        made[key.split(" ")[0]].add(key.rsplit("sm_", 1)[1])
    assert set(made) == started()
    assert all(found == {"80", "90", "100", "120"} for found in made.values())


def test_one_of_each_kernel_keeps_its_budget(builds):
    check(builds[1])


@pytest.mark.slow
def test_every_build_for_hopper_keeps_its_budget(tmp_path):
    check(build(tmp_path, "all")[1])


def test_there_is_a_budget_for_each_build_and_none_besides(builds):
    keys, _ = builds
    assert len(keys) == len(set(keys))
    assert set(keys) == budgets.read()[1].keys()


def recorded(kernel: str, capability: int) -> dict[str, budgets.Budget]:
    """The budgets of a kernel's builds for an architecture."""
    found = budgets.read()[1].items()
    return {key: one for key, one in found if key.startswith(f"{kernel} | ") and key.endswith(f" sm_{capability}")}


@pytest.mark.parametrize(
    "kernel", ["attention.attention_fwd", "attention_bwd.attention_bwd_kv", "attention_bwd.attention_bwd_q"]
)
def test_attention_runs_on_hoppers_tensor_cores(kernel):
    """Tiles of at least 64 rows in 16 bits; float32 is multiplied in float32."""
    narrow = {key: one for key, one in recorded(kernel, 90).items() if " f32 " not in key}
    assert len(narrow) >= 10
    assert [key for key, one in narrow.items() if not one.hopper_products] == []


def test_decoding_runs_on_tensor_cores():
    """Tiles of 16 rows, fewer than HGMMA takes: HMMA."""
    narrow = {key: one for key, one in recorded("decode.attention_decode", 90).items() if " f32 " not in key}
    assert narrow
    assert [key for key, one in narrow.items() if not one.products] == []


@pytest.mark.parametrize(("capability", "most"), [(80, 163), (90, 227), (100, 227), (120, 99)])
def test_shared_memory_is_what_a_block_may_have(capability, most):
    """KiB, by the CUDA C++ Programming Guide's table of technical specifications: a launch that asks for more fails."""
    of_these = {key: one for key, one in budgets.read()[1].items() if key.endswith(f" sm_{capability}")}
    assert of_these
    assert [key for key, one in of_these.items() if one.shared > most * 1024] == []


def started() -> set[str]:
    """The kernels that the examples' launches start, as `aot` names them."""
    launches = [launch for example in all_examples() for launch in record(example, capability=90).launches]
    functions = [launch.function.fn if launch.grid else None for launch in launches]
    return {f"{Path(f.__code__.co_filename).stem}.{f.__name__}" for f in functions if f is not None}


def declared() -> set[str]:
    """The kernels that can be started: jitted, of a public name, and not called by another one."""
    found, called = set(), set()
    for file in HOME.glob("*.py"):
        module = __import__(f"smedjan.backends.cuda_triton.kernels.{file.stem}", fromlist=["kernels"])
        for name, one in getmembers(module, lambda value: hasattr(value, "fn")):
            called.update(one.fn.__code__.co_names)
            if one.fn.__module__ == module.__name__ and not name.startswith("_"):
                found.add(f"{file.stem}.{name}")
    return {name for name in found if name.split(".")[1] not in called}


def test_every_kernel_has_an_example():
    assert declared() - started() == set()


def test_an_example_is_named_once_and_starts_something():
    names = [(example.op, example.name) for example in all_examples()]
    assert len(names) == len(set(names))
    for example in all_examples():
        assert record(example, capability=90).launches, f"{example.op} {example.name} starts nothing"


@pytest.mark.parametrize("architecture", sorted(tuned.table()))
def test_every_tuned_shape_is_an_examples(monkeypatch, architecture):
    """What tuned.json ships for an architecture is built: all its kernels and shape classes are asked for."""
    asked = defaultdict(set)
    found = tuned.options

    def options(kernel: str, shape_class: str, **given: int) -> tuned.Shape:
        asked[kernel].add(shape_class)
        return found(kernel, shape_class, **given)

    monkeypatch.setattr(tuned, "options", options)
    for example in all_examples():
        record(example, capability=architecture)
    for kernel, shapes in tuned.table()[architecture].items():
        # A choice between libraries is nothing to build.
        assert kernel.endswith("_choice") or shapes.keys() - asked[kernel] == set(), kernel


SPECIALISED = """
import json
import torch
from smedjan.backends.cuda_triton import aot
from smedjan.backends.cuda_triton.examples.example import Example, array

def halves(width):
    return array(64, 2 * width).chunk(2, dim=-1)

if __name__ == "__main__":
    cases = [
        (array(64, 1024), array(64, 1024)), halves(1024), halves(1020), (array(1, 1), array(1, 1)), halves(1022)
    ]
    shown = []
    for number, ins in enumerate(cases):
        (build,) = aot.builds([Example(op="glu", name=str(number), ins=ins, attrs={"act": "silu"})], (90,))
        names = [name for name, _ in build.signature]
        shown.append([[names[path[0]] for path, _ in build.attributes], dict(build.signature)["width"]])
    print(json.dumps(shown))
"""


def test_a_build_is_specialised_as_its_launch_would_be(tmp_path):
    """Multiples of 16 are told to the compiler, so is where an array begins in a wider one; 1 is built in; `blocks`,
    which follows from the number of rows, says nothing."""
    pointers, strides = ["gate", "up", "y"], ["gate_stride", "up_stride", "y_stride"]
    assert script(tmp_path, SPECIALISED) == [
        [[*pointers, *strides, "width"], "i32"],
        [[*pointers, *strides, "width"], "i32"],
        # up begins 1020 values, 2040 bytes, behind gate: no multiple of 16. 2040 values are none either.
        [["gate", "y"], "i32"],
        [pointers, "constexpr"],
        [["gate", "y"], "i32"],
    ]


def test_recorded_arrays_lie_as_the_rule_wants_them():
    heads = array(2, 3, 5, 64, order=(0, 2, 1, 3))
    assert heads.shape == (2, 3, 5, 64)
    assert heads.stride() == (5 * 3 * 64, 64, 3 * 64, 1)
    example = Example(op="glu", name="halves", ins=array(4, 32).chunk(2, dim=-1), attrs={"act": "silu"})
    (launch,) = record(example, capability=90).launches
    gate, up, y = launch.args[:3]
    assert gate.stride() == up.stride() == (32, 1)
    assert up.data_ptr() - gate.data_ptr() == 32
    assert y.dtype == torch.bfloat16


def test_building_while_interpreting_is_an_error_that_says_so(device):
    if device == "cuda":
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(BackendError, match=r"TRITON_INTERPRET.*unset it"):
        aot.builds()


CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 LDG.E R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/              @P2  BRA `(.L_x_0) ;
        /*0060*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0070*/              @P3  BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""


def test_machine_code_is_read_with_its_loops_and_widths():
    code = sass.parse(CODE)
    assert len(code.instructions) == 11
    assert [one.depth for one in code.instructions] == [0, 0, 1, 1, 2, 2, 1, 1, 0, 0, 0]
    assert [one.width for one in code.named(("LDG", "STG"))] == [16, 4, 2]
    assert [one.guarded for one in code.named(("LDG",))] == [False, True]
    assert code.count("HGMMA") == 1
    assert code.wide("LDG") == 1
    assert code.bytes(("LDG",), threads=128) == 20 * 128
    assert code.loops == 2
    assert not code.straight
    assert sass.parse("\n".join(CODE.splitlines()[:4])).straight
