"""fp8_linear on Triton and the library against float64 products of the rounded operands, and of the unrounded ones."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from smedjan.backends.cuda_triton import fp8
from smedjan.backends.cuda_triton.apply import apply, prepare
from smedjan.backends.cuda_triton.kernels import fp8 as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.backends.torch_reference.fp8 import fp8_rounded
from smedjan.graph.grad import grad
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import decompose
from smedjan.ops.fp8 import fp8_linear_group
from smedjan.ops.linear import linear, linear_group
from smedjan.passes.fp8 import fp8 as fp8_pass
from tests.backends.cuda_triton.mutate import fails, mutated
from tests.tolerances import assert_close

BF16 = torch.bfloat16


@triton.jit
def _codes(x, y, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    tl.store(y + col, kernels.e4m3(tl.load(x + col)).to(tl.uint8))


def test_codes_are_torchs(device):
    """Every number of e4m3, the middles between them, the float32 around both, signs, zeros, NaN, random numbers."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    positive = numbers[:127]
    middles = (positive[1:] + positive[:-1]) / 2
    edges = torch.cat((positive, middles, torch.tensor([448.0, 1e-30, 1e-45])))
    around = torch.cat((edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(500.0)).clamp(max=448)))
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(3000, generator=generator) * 10.0 ** (4 - 8 * torch.rand(3000, generator=generator))
    x = torch.cat((around, -around, spread.clamp(-448, 448), torch.tensor([float("nan")])))
    x = torch.nn.functional.pad(x, (0, -len(x) % 1024))
    codes = torch.zeros(len(x), dtype=torch.uint8, device=device)
    _codes[(len(x) // 1024,)](x.to(device), codes, COLS=1024)
    expected = x.to(torch.float8_e4m3fn)
    assert torch.equal(codes.cpu().view(torch.float8_e4m3fn).isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(codes.cpu()[kept], expected.view(torch.uint8)[kept])


def generated() -> list[tuple[tuple[int, ...], int, int, bool]]:
    """40 layers: rows, in, out (multiples of 16), bias; one row, rows wider than a program's step."""
    chance = random.Random(8)
    found: list[tuple[tuple[int, ...], int, int, bool]] = [((1,), 16, 16, False), ((3,), 8208, 16, True)]
    found += [((1, 1), 64, 48, True), ((5,), 8192, 16, False)]
    while len(found) < 40:
        rows = tuple(chance.randrange(1, 9) for _ in range(chance.randrange(1, 3)))
        found.append((rows, 16 * chance.randrange(1, 20), 16 * chance.randrange(1, 8), chance.random() < 0.5))
    return found


def draw(rand: Any, rows: tuple[int, ...], width: int, out: int, biased: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows and channels of different sizes: one scale for all would cost the small ones their digits."""
    x = rand(*rows, width) * 10.0 ** rand(*rows, 1)
    weight = rand(out, width, scale=0.05) * 10.0 ** rand(out, 1, scale=0.5)
    return x.to(BF16), weight.to(BF16), rand(out, dtype=BF16) if biased else None


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the bound of the float64 product of the operands as e4m3 has them."""
    y = apply("fp8_linear", x, weight, bias)
    assert y.dtype == BF16
    operands = fp8_rounded(x), fp8_rounded(weight)
    true = torch.nn.functional.linear(*(o.double() for o in operands), None if bias is None else bias.double())
    plain = torch.nn.functional.linear(*operands, None if bias is None else bias.float()).to(BF16)
    # Each row by its own largest value: a bound for all would be that of the largest row.
    for n, parts in enumerate(zip(*(t.reshape(-1, t.shape[-1]) for t in (y, true, plain)), strict=True)):
        assert_close(f"y {n}", *parts)


@pytest.mark.parametrize(("rows", "width", "out", "biased"), generated(), ids=str)
def test_the_product_is_within_the_derived_bound(rand, rows, width, out, biased):
    check(*draw(rand, rows, width, out, biased))


@pytest.mark.parametrize("biased", [False, True])
def test_a_group_is_its_members(rand, same, biased):
    """One quantisation of x, one of the stacked weights, one product: a row's codes and scale are its own."""
    x, *_ = draw(rand, (7,), 48, 16, False)
    members = [draw(rand, (1,), 48, out, True)[1:] for out in (32, 16, 48)]
    tensors = [weight for weight, _ in members] + [bias for _, bias in members if biased]
    calls, (y,) = prepare("fp8_linear_group", x, *tensors, biased=biased)
    assert [call.name for call in calls] == ["fp8_quantize", "fp8_quantize", "cublas _scaled_mm"]
    for call in calls:
        call()
    parts = y.split([32, 16, 48], dim=-1)
    for part, (weight, bias) in zip(parts, members, strict=True):
        same(part, apply("fp8_linear", x, weight, bias if biased else None))


@pytest.mark.parametrize("biased", [False, True])
def test_the_gradient_of_a_group_is_that_of_linear_group(biased):
    """Straight through: of x and the weights as they are."""
    gradients = []
    for op in (linear_group, fp8_linear_group):
        graph = Graph()
        shapes = [(4, 32), (16, 32), (48, 32)] + [(16,), (48,)] * biased
        inputs = [graph.input(f"{n}", shape, "bfloat16") for n, shape in enumerate(shapes)]
        y = op(*inputs, biased=biased)
        for n, each in enumerate(grad(y, inputs, seeds={y: graph.input("dy", y.shape, y.dtype)})):
            graph.output(f"{n}", each)
        gradients.append([(n.op.name, tuple(t.node.id for t in n.inputs if t)) for n in graph.nodes if n is not y.node])
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize("biased", [False, True])
def test_the_decomposition_is_torch_references_rule(rand, biased):
    arrays = draw(rand, (5,), 48, 32, biased)
    node = node_of("fp8_linear", arrays, {})
    node.graph.output("y", node.outputs[0])
    graph = decompose(node.graph, lambda each: each.op.name != "fp8_linear")
    assert [each.op.name for each in graph.nodes].count("fp8_rounded") == 2
    bound = {f"{n}": array for n, array in enumerate(arrays) if array is not None}
    (y,) = Program(graph, ATEN)(bound).values()
    (rule,) = Program(node.graph, ATEN)(bound).values()
    assert torch.equal(y, rule)


def test_rows_of_zeros_and_tiny_rows(rand, device):
    x, weight = torch.zeros(3, 32, dtype=BF16, device=device), rand(16, 32, dtype=BF16)
    x[1] = 1e-38
    y = apply("fp8_linear", x, weight)
    assert bool((y[::2] == 0).all())
    assert bool(y.isfinite().all())
    assert apply("fp8_linear", rand(0, 32, dtype=BF16), weight).shape == (0, 16)


def test_a_view_of_wider_rows(rand, same):
    wide, weight = rand(4, 96, dtype=BF16), rand(32, 48, dtype=BF16)
    same(apply("fp8_linear", wide[:, 48:], weight), apply("fp8_linear", wide[:, 48:].contiguous(), weight))


def test_the_error_that_is_shown(rand):
    """e4m3's unit roundoff is 2^-4; of two operands of normal numbers, whose errors are independent and uniform within
    their binades, the product's relative error is some 0.037. A bfloat16 product's is fifteen times smaller."""
    x, weight = rand(64, 512, dtype=BF16), rand(64, 512, dtype=BF16)
    found = fp8.fp8_error(x, weight)
    assert 0.02 < found < 2.0**-4
    exact = x.float() @ weight.float().t()
    assert float(((x @ weight.t()).float() - exact).norm() / exact.norm()) < found / 15


def test_the_error_is_summed_over_blocks_of_rows(rand, monkeypatch):
    x, weight = rand(2, 25, 32, dtype=BF16), rand(16, 32, dtype=BF16)
    whole = fp8.fp8_error(x, weight)
    monkeypatch.setattr(fp8, "ERROR_ROWS", 16)
    assert fp8.fp8_error(x, weight) == pytest.approx(whole, rel=1e-6)
    assert fp8.fp8_error(torch.zeros_like(x), weight) == 0.0


def _layers(dtype: str, width: int) -> Graph:
    graph = Graph()
    x = graph.input("x", (4, width), dtype)
    for name in ("a", "head"):
        x = linear(x, graph.input(name, (width, width), dtype))
    graph.output("y", x)
    return graph


def test_the_pass_makes_what_the_rule_takes():
    """bfloat16 layers of whole 16 bytes, but for those kept; the backward is `linear`'s, of x and W themselves."""
    graph = fp8_pass(_layers("bfloat16", 32), keep=("head",))
    assert [node.op.name for node in graph.nodes if node.op.name != "input"] == ["fp8_linear", "linear"]
    graph.output("dx", grad(graph.outputs["y"], [graph.inputs["x"]], seeds={graph.outputs["y"]: graph.inputs["x"]})[0])
    assert [node.op.name for node in graph.nodes][-2:] == ["linear_dx", "linear_dx"]
    assert RULES.lower(next(n for n in graph.nodes if n.op.name == "fp8_linear")).label.startswith("triton")
    for unchanged in (_layers("float32", 32), _layers("bfloat16", 24)):
        assert all(node.op.name in ("input", "linear") for node in fp8_pass(unchanged).nodes)


MUTATIONS = {
    "one scale for all rows": {"tl.max(largest, axis=1)": "tl.max(largest) + 0.0 * tl.max(largest, axis=1)"},
    "rounding towards zero": {"bits + 0x7FFFF + ((bits >> 20) & 1)": "bits"},
    "sign dropped": {"    return code | (": "    return code | 0 * ("},
    "exponent's bias": {"(127 - 7)": "(127 - 8)"},
    "last column skipped": {"inside = there & (start + col < width)": "inside = there & (start + col < width - 1)"},
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_out_of_bound(rand, monkeypatch, tmp_path, name):
    arrays = draw(rand, (5,), 48, 32, False)
    check(*arrays)
    monkeypatch.setattr(fp8, "kernels", mutated(kernels, MUTATIONS[name], tmp_path))
    assert fails(lambda: check(*arrays))
