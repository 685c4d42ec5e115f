"""Results that one product writes together reach everybody who reads them, wherever the plan has put them.

Gradients that are a program's outputs are moved, once, to lie one behind another. A place in the arena cannot be moved:
there the product's rows are copied to their places. Small integers, so that every sum is exact. (They were once written
to an array that nobody read, unless the places happened to touch: with two micro-batches LoRA's gradients of stacked
projections were what had lain there.)
"""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.cpu_native.table import PLANNED
from smedjan.backends.cuda_triton.cuda import RULES as TRITON
from smedjan.backends.planned import memory
from smedjan.backends.planned.pool import Pool
from smedjan.backends.planned.program import PlannedProgram
from smedjan.graph.node import Graph
from smedjan.ops.elementwise import scale
from smedjan.ops.linear import linear_group_dw
from smedjan.ops.lora import lora_linear_group_bwd

TABLES = {"cpu_native": PLANNED, "cuda_triton": TRITON}
SIZES = (3, 5)  # times 7 columns of float32: no multiple of the arena's alignment, so that places do not touch
pytestmark = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def run(graph: Graph, table, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    program = PlannedProgram(graph, table, Pool(torch.device("cpu")))
    made = {name: value.clone() for name, value in program(inputs).items()}
    again = program(inputs)
    assert all(torch.equal(made[name], again[name]) for name in made), "the second run is the first one's"
    return made


@pytest.mark.parametrize("read", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("direct", [True, False])
def test_a_products_rows(table, direct, read):
    """`direct`: gradients that are outputs themselves, else outputs are made of them."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randint(-4, 5, (4, width), generator=generator).float() for width in (sum(SIZES), 7))
    graph = Graph()
    made = linear_group_dw(
        *(graph.input(name, tuple(t.shape), "float32") for name, t in (("dy", dy), ("x", x))), sizes=SIZES
    )
    for name, gradient, wanted in zip("ab", made, read, strict=True):
        if wanted:
            graph.output(f"grad.{name}", gradient if direct else scale(gradient, factor=2.0))
    found = run(graph, table, {"dy": dy, "x": x})
    truth = dict(zip("ab", (dy.T.double() @ x.double()).split(SIZES), strict=True))
    factor = 1 if direct else 2
    assert set(found) == {f"grad.{name}" for name, wanted in zip("ab", read, strict=True) if wanted}
    for name, gradient in found.items():
        assert torch.equal(gradient.double(), factor * truth[name.removeprefix("grad.")])


@pytest.mark.parametrize("direct", [True, False])
def test_adapters_of_one_input(table, direct):
    generator = torch.Generator().manual_seed(1)
    rank, widths, tokens = 3, (6, 4), 5
    shapes = {"dy": (1, tokens, sum(widths)), "x": (1, tokens, 7), "low": (1, tokens, 2 * rank)}
    shapes |= {"w0": (6, 7), "w1": (4, 7), "a0": (rank, 7), "a1": (rank, 7), "b0": (6, rank), "b1": (4, rank)}
    given = {name: torch.randint(-4, 5, shape, generator=generator).float() for name, shape in shapes.items()}
    graph = Graph()
    dy, x, low, *rest = (graph.input(name, shape, "float32") for name, shape in shapes.items())
    made = lora_linear_group_bwd(
        dy, x, low, None, *rest, adapted=(True, True), needs=(False, True), scaling=0.5, together=True
    )
    names = ("a0", "a1", "b0", "b1")
    for name, gradient in zip(names, made, strict=True):
        graph.output(f"grad.{name}", gradient if direct else scale(gradient, factor=2.0))
    found = run(graph, table, given)
    wide = {name: value.double().squeeze(0) for name, value in given.items()}
    for index, (dy, low) in enumerate(zip(wide["dy"].split(widths, 1), wide["low"].split(rank, 1), strict=True)):
        truth = {"a": 0.5 * (dy @ wide[f"b{index}"]).T @ wide["x"], "b": 0.5 * dy.T @ low}
        for kind, value in truth.items():
            assert torch.equal(found[f"grad.{kind}{index}"].double(), value if direct else 2 * value)


def test_a_place_in_the_arena_is_never_moved(table):
    """A rule that asked for it would write where nobody reads."""
    arena = torch.zeros(64)
    with pytest.raises(AssertionError, match="arena"):
        memory.stacked(
            [arena[:8].view(2, 4), arena[16:24].view(2, 4)], lambda *a: torch.empty(a[0]), lambda array: False
        )
