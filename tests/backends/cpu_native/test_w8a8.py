"""Products of 8-bit integers in plans: torch_reference's bits from every build of the kernels, by any number of
threads; adapters beside them; and that one coding of x serves a group."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from smedjan.backends.cpu_native import PLANNED, native, w8a8
from smedjan.backends.planned.immediate import node_of, written
from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.backends.torch_reference import w8a8 as reference
from smedjan.runtime.select import backend
from tests.conftest import assert_bits
from tests.tolerances import assert_close

WAYS = {"no AVX-512": {"AVX-VNNI", "AVX2"}, "no VNNI": {"AVX2"}, "portable": {"plain C"}}
"""Of conftest's builds, where not all ways are open."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def coded(weight: Tensor) -> tuple[Tensor, Tensor]:
    return ATEN.lower(node_of("int8_quantize", (weight,), {})).run(weight)


def rule(op: str, ins: tuple, attrs: dict):
    return PLANNED.lower(node_of(op, ins, attrs))


def generated() -> list[tuple[int, int, int, bool]]:
    """Rows, in, out, bias: ends of tiles (12 rows, 32 outputs), panels, quads and blocks (96 rows), and chance."""
    chance = random.Random(3)
    found = [(rows, 9, 33, False) for rows in (1, 5, 11, 12, 13, 95, 96, 97, 193)]
    found += [(3, width, 20, True) for width in (1, 2, 3, 4, 5, 63, 64, 257)]
    found += [(3, 8, out, True) for out in (1, 15, 16, 17, 31, 32, 33, 64, 97)]
    while len(found) < 60:
        found.append(
            (chance.randrange(1, 210), chance.randrange(1, 300), chance.randrange(1, 130), chance.random() < 0.5)
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_build_gives_the_references_bits(build, dtype):
    """Rows of many sizes, of zeros, with one huge value, and one that is not finite."""
    for rows, width, out, biased in generated():
        x = normal(rows, width) * 10.0 ** (3 * normal(rows, 1, seed=1))
        x[rows // 2, -1] *= 1e6
        x[-1] = 0 if rows % 2 else -1.5
        if rows > 9:
            x[3, 0] = float("nan")
            x[4, -1] = float("-inf")
        weight = normal(out, width, seed=2).to(dtype)
        bias = (normal(out, seed=3).to(dtype),) if biased else ()
        ins = (x.to(dtype), weight, *coded(weight), *bias)
        ours = rule("w8a8_linear", ins, {"biased": biased})
        assert ours.label.removeprefix("native w8a8, ") in WAYS.get(build, w8a8.WAYS)
        y, expected = (table.lower(node_of("w8a8_linear", ins, {"biased": biased})) for table in (PLANNED, ATEN))
        found, theirs = (each.run(*ins, biased=biased) for each in (y, expected))
        name = f"{rows} x {width} -> {out}"
        assert torch.equal(found.isnan(), theirs.isnan()), name
        assert_bits(found.nan_to_num(), theirs.nan_to_num(), name)


def test_the_largest_sums(build):
    """127^2 in every product: what 16-bit sums of pairs must hold, and 128 times a row's sum in int32."""
    width = 16_390
    x = torch.ones(13, width)
    x[::2] = -1
    x[1, ::3] *= -1
    weight = torch.ones(33, width)
    weight[1::2] = -1
    ins = (x, weight, *coded(weight))
    assert_bits(rule("w8a8_linear", ins, {}).run(*ins, biased=False), reference.w8a8_linear(*ins, biased=False), "y")


def test_threads_do_not_change_the_bits(build):
    ins = (normal(150, 70), weight := normal(100, 70), *coded(weight))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(rule("w8a8_linear", ins, {}).run(*ins, biased=False))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert_bits(each, found[0], "y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_group_is_one_product_of_rows_coded_once(dtype, biased):
    sizes, x = (17, 40, 1), normal(2, 5, 30).to(dtype)
    weights = [normal(size, 30).to(dtype) for size in sizes]
    codes, scales = zip(*map(coded, weights), strict=True)
    biases = [normal(size, seed=4).to(dtype) for size in sizes] if biased else []
    ins = (x, *weights, *codes, *scales, *biases)
    lowered = rule("w8a8_linear", ins, {"biased": biased})
    calls, (y,) = written("w8a8_linear", lowered.bind, lowered.donates, False, *ins, biased=biased)
    assert [call.name for call in calls] == ["native w8a8 codes", "native w8a8 product"]
    for call in calls:
        call()
    members = [reference.product(x, q, s, b) for q, s, b in zip(codes, scales, biases or [None] * 3, strict=True)]
    assert_bits(y, torch.cat(members, dim=-1), "y")


def test_rows_of_a_wider_array():
    wide, weight = normal(6, 50), normal(9, 20)
    ins = (wide[:, 30:], weight, *coded(weight))
    assert_bits(rule("w8a8_linear", ins, {}).run(*ins, biased=False), reference.w8a8_linear(*ins, biased=False), "y")


def test_no_rows():
    ins = (normal(0, 8), weight := normal(5, 8), *coded(weight))
    assert rule("w8a8_linear", ins, {}).run(*ins, biased=False).shape == (0, 5)


def _adapted(dtype, sizes, adapted, biased, rank=3, width=24):
    weights = [normal(size, width).to(dtype) for size in sizes]
    codes, scales = zip(*map(coded, weights), strict=True)
    biases = [normal(size, seed=4).to(dtype) for size in sizes] if biased else []
    a = [normal(rank, width, seed=5 + n) for n, has in enumerate(adapted) if has]
    b = [normal(size, rank, seed=9) for size, has in zip(sizes, adapted, strict=True) if has]
    return (normal(4, 7, width).to(dtype), *weights, *codes, *scales, *biases, *a, *b), codes, scales, biases, a, b


@pytest.mark.parametrize("compiled", [True, False], ids=["native", "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("sizes", "adapted"), [((20,), (True,)), ((20, 9), (True, True)), ((8, 4, 6), (True, False, True))]
)
def test_adapters_beside_it(sizes, adapted, biased, dtype, compiled, monkeypatch):
    """The base to the bit; what adapters add, within the bound of the float64 sum. `low` is x A^T of all of them."""
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    ins, codes, scales, biases, a, b = _adapted(dtype, sizes, adapted, biased)
    attrs = {"adapted": adapted, "biased": biased, "scaling": 0.5}
    lowered = rule("w8a8_lora_linear", ins, attrs)
    assert lowered.label.startswith("native w8a8, " if compiled else "aten, in float64")
    y, low = lowered.run(*ins, **attrs)
    x = ins[0]
    assert_close("low", low, x.double() @ torch.cat(a).double().T, x.float() @ torch.cat(a).T)
    start, left = 0, iter(zip(a, b, strict=True))
    for n, (size, has) in enumerate(zip(sizes, adapted, strict=True)):
        base = reference.product(x, codes[n], scales[n], biases[n] if biased else None)
        part = y[..., start : start + size]
        start += size
        if not has:
            assert_bits(part, base, f"member {n}")
            continue
        down, up = next(left)
        true = base.double() + 0.5 * (x.double() @ down.double().T @ up.double().T)
        plain = (base.float() + 0.5 * (x.float() @ down.T @ up.T)).to(dtype)
        assert_close(f"member {n}", part, true, plain)


def test_without_a_compiler_the_plan_says_so(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    ins = (normal(5, 12), weight := normal(7, 12), *coded(weight))
    lowered = rule("w8a8_linear", ins, {})
    assert lowered.label == "aten, in float64"
    assert_bits(lowered.run(*ins, biased=False), reference.w8a8_linear(*ins, biased=False), "y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_that_is_shown(dtype, monkeypatch):
    """|y - x W^T| / |x W^T| in float64, of y by the rule that runs; the float32 product beside it is off by its own
    roundings alone, of I terms each (Higham 2002, eq. 3.5). Blocks of rows, of which the last is short, add up."""
    monkeypatch.setattr(reference, "ERROR_ROWS", 16)
    x, weight = normal(5, 9, 64).to(dtype), normal(30, 64).to(dtype)
    codes, scale = coded(weight)
    exact = x.double() @ weight.double().T
    y = reference.product(x, codes, scale, None).double()
    rounding = 64 * 2.0**-24 * float((x.double().abs() @ weight.double().abs().T).norm() / exact.norm())
    for name in ("cpu_native", "torch_reference"):
        found = backend(name).w8a8_measure(field="f")(x, weight, codes, scale)
        assert abs(found - float((y - exact).norm() / exact.norm())) <= 2 * rounding
        assert 1e-3 < found < 2e-2
        assert backend(name).w8a8_measure(field="f")(torch.zeros_like(x), weight, codes, scale) == 0.0
