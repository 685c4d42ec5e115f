"""Accesses as the interpreter counts them, against what is known of a kernel and against its machine code."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from smedjan.backends.cuda_triton import roofline
from smedjan.backends.cuda_triton.examples import Example, all_examples, explained
from smedjan.backends.cuda_triton.examples.example import array
from smedjan.backends.planned.launch import Launch
from smedjan.errors import BackendError

pytestmark = pytest.mark.skipif(
    os.environ.get("SMEDJAN_TEST_DEVICE") == "cuda", reason="accesses are counted in the interpreter"
)

TABLE = Path(__file__).parents[3] / "bench" / "kernels.md"

SAMPLE = ("glu", "glu_bwd", "rms_norm", "rope", "add", "accumulate", "linear_cross_entropy", "lora_linear")
"""Ops whose rows are made anew."""


@triton.jit
def sweep(x, weight, y, width, COLS: tl.constexpr):
    """A row of x times the weight, twice for odd rows: what is counted is known."""
    row = tl.program_id(0)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        inside = col < width
        value = tl.load(x + row * width + col, mask=inside) * tl.load(weight + col, mask=inside)
        tl.store(y + row * width + col, value, mask=inside)
        if row % 2 == 1:
            tl.store(y + row * width + col, value, mask=inside)


def launch_of(rows: int, width: int) -> Launch:
    x, weight, y = (roofline.zeros(shape, torch.float32) for shape in ((rows, width), (width,), (rows, width)))
    return Launch(name="sweep", function=sweep, grid=(rows,), args=(x, weight, y, width), constants={"COLS": 32})


def test_every_lane_that_a_mask_lets_through_is_counted():
    found = roofline.traffic(launch_of(4, 100))
    row = 4 * 100
    assert found.requested == {"x": [4 * row, 0], "weight": [4 * row, 0], "y": [0, 6 * row]}
    assert found.moved == 4 * row + row + 4 * row


def test_a_sample_of_many_programs_stands_for_all():
    whole, row = roofline.traffic(launch_of(5000, 100)), 4 * 100
    assert whole.requested["x"] == [pytest.approx(5000 * row), 0]
    assert whole.requested["y"] == [0, pytest.approx(7500 * row, rel=0.05)]


def test_halves_of_a_wider_array_are_counted_as_they_are():
    example = Example(op="glu", name="halves", ins=array(4, 2048).chunk(2, dim=-1), attrs={"act": "silu"})
    found = roofline.count(example)
    assert found.launches[0].requested == {"gate": [8192, 0], "up": [8192, 0], "y": [0, 8192]}
    assert found.moved == found.requested == 1.0
    assert found.bound == 4 * 3072 * 2 / 3.35e12


def test_a_library_call_reads_or_writes_each_array_once():
    x = roofline.zeros((3, 4), torch.bfloat16)
    found = roofline.traffic(Launch(name="cublas mm", function=torch.mm, grid=(), args=(x, x), constants={"out": x}))
    assert found.reads == 3 * 24


CODE = """
import json
from smedjan.backends.cuda_triton import aot
from smedjan.backends.cuda_triton.examples import Example
from smedjan.backends.cuda_triton.examples.example import array

{function}

if __name__ == "__main__":
    print(json.dumps(aot.codes(elementwise())))
"""


def elementwise() -> list[Example]:
    """Straight kernels with whole tiles, and one with a masked tail: three tiles of 1024 for 2500 values."""
    wide = array(64, 4096)
    attrs = {"act": "silu"}
    return [
        Example(op="glu", name="bf16", ins=(wide, wide), attrs=attrs),
        Example(
            op="glu", name="f32", ins=(array(8, 1024, dtype="float32"), array(8, 1024, dtype="float32")), attrs=attrs
        ),
        Example(op="glu_bwd", name="bf16", ins=(wide, wide, wide), attrs={"needs": (True, True), **attrs}),
        Example(op="accumulate", name="f32", ins=(array(4096, dtype="float32"), array(4096, dtype="float32"))),
        Example(op="glu", name="tail", ins=(array(1, 2500), array(1, 2500)), attrs=attrs),
    ]


def test_the_machine_code_moves_what_the_source_asks_for(tmp_path):
    """Width of each access x threads x programs: the compiler loads nothing twice and nothing besides."""
    file = tmp_path / "code.py"
    file.write_text(CODE.replace("{function}", inspect.getsource(elementwise)), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *whole, tail = json.loads(done.stdout)
    counted = [sum(one.reads + one.writes for one in roofline.count(example).launches) for example in elementwise()]
    assert whole == counted[:-1]
    assert counted[-1] == 3 * 2 * 2500
    assert tail == 3 * 2 * 3 * 1024


def test_counting_what_is_compiled_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(roofline.common, "INTERPRETED", tl.constexpr(False))
    with pytest.raises(BackendError, match=r"TRITON_INTERPRET.*set it to 1"):
        roofline.count(elementwise()[0])


def rows() -> dict[tuple[str, str], list[str]]:
    """(op, example) -> the cells of the table's line."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {(found[0], found[1]): found for found in cells}


def test_the_table_has_a_row_for_each_example_and_none_besides():
    assert list(rows()) == [(example.op, example.name) for example in all_examples()]


def test_what_moves_too_much_is_explained():
    for (op, name), cells in rows().items():
        if max(float(cells[4]), float(cells[5])) > roofline.EXPLAIN:
            assert cells[-1] == explained()[op], f"{op} {name}"
        else:
            assert not cells[-1], f"{op} {name}"


def smallest(op: str) -> Example:
    found = [example for example in all_examples() if example.op == op]
    return min(found, key=lambda one: sum(t.numel() for t in one.ins if isinstance(t, torch.Tensor)))


@pytest.mark.parametrize("op", SAMPLE)
def test_rows_of_the_table_made_anew_are_the_same(op):
    example = smallest(op)
    again = [
        cell.strip() for cell in roofline.row(roofline.count(example), explained().get(op, "")).strip("|").split(" | ")
    ]
    kept = rows()[op, example.name]
    del again[roofline.CODE_COLUMN], kept[roofline.CODE_COLUMN]
    assert again == kept
