"""Products on AMX's tiles, by instructions and by the plain loops that stand for them: within bound of float64 for any
layout, edge and part; nothing is read or written beside the operands; who shares the work changes no bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from smedjan.backends.cpu_native import PLANNED, amx, loss
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.planned.launch import Launches
from tests.backends.cpu_native.conftest import loaded, poisoned
from tests.backends.cpu_native.fused_cases import CHUNKED
from tests.conftest import assert_bits
from tests.tolerances import assert_close

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(params=["this CPU's", "portable"])
def build(request, monkeypatch):
    with loaded(request.param, monkeypatch):
        if not amx.available():
            pytest.skip("no AMX")
        yield request.param


def run(a: Tensor, b: Tensor, out: Tensor, plus: Tensor | None = None) -> None:
    made = Launches(torch.device("cpu"), scratch=poisoned, host=None, allocate=None)  # type: ignore[arg-type]
    amx.product(made, a, b, out, plus=plus)
    for each in made.calls:
        each()


def inside(x: Tensor, pad: int) -> Tensor:
    """x in a wider array of NaN."""
    wide = poisoned((x.shape[0], x.shape[1] + pad), x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def operand(draw: random.Random, rows: int, columns: int, seed: int) -> Tensor:
    """bfloat16 [rows, columns] in rows or in columns, which may lie apart."""
    turned, pad = draw.random() < 0.5, draw.choice([0, 3, 16])
    shape = (columns, rows) if turned else (rows, columns)
    made = inside(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16), pad)
    return made.t() if turned else made


def check(name: str, a: Tensor, b: Tensor, dtype: torch.dtype, plus: Tensor | None) -> Tensor:
    whole = poisoned((a.shape[0] + 1, b.shape[1] + 5), dtype)
    out = whole[:-1, :-5]
    run(a, b, out, plus)
    more = torch.zeros(()) if plus is None else plus
    assert_close(name, out, a.double() @ b.double() + more.double(), a.float() @ b.float() + more.float())
    assert whole[-1].isnan().all(), f"{name}: written below the result"
    assert whole[:, -5:].isnan().all(), f"{name}: written beside the result"
    return out


def shapes() -> list[tuple[int, int, int]]:
    """Rows, columns, depth: around tiles and blocks, and chance."""
    draw = random.Random(5)
    found = [(rows, 20, 40) for rows in (1, 15, 16, 17, 31, 32, 33, 65)]
    found += [(20, columns, 40) for columns in (1, 15, 16, 17, 31, 32, 33, 65, 33 * 32)]
    found += [(20, 20, depth) for depth in (1, 2, 3, 31, 32, 33, 64)]
    while len(found) < 60:
        found.append((draw.randrange(1, 200), draw.randrange(1, 200), draw.randrange(1, 200)))
    return found


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_products(build, dtype):
    draw = random.Random(7)
    for number, (rows, columns, depth) in enumerate(shapes()):
        a, b = operand(draw, rows, depth, number), operand(draw, depth, columns, number + 1000)
        plus = (None, torch.randn(columns).to(dtype), inside(torch.randn(rows, columns).to(dtype), 2))[number % 3]
        torch.set_num_threads(draw.choice([1, 2, 3, 4]))
        check(f"{rows} x {depth} x {columns}, strides {a.stride()} {b.stride()}", a, b, dtype, plus)


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_depth_in_parts(build, turned, monkeypatch):
    """Of more rows than those whose sums wait, by threads that have a part of them each."""
    monkeypatch.setattr(amx, "WHOLE", 64)
    monkeypatch.setattr(amx, "PART", 48)
    a = torch.randn(130, 1100, generator=torch.Generator().manual_seed(1)).to(BF16).t()
    a = a if turned else a.contiguous()
    b = torch.randn(130, 170, generator=torch.Generator().manual_seed(2)).to(BF16)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        check(f"{threads} threads", a, b, F32, torch.randn(1100, 170))


def test_a_total_is_added_to_where_it_lies(build):
    a, b = torch.randn(40, 50).to(BF16), torch.randn(50, 70).to(BF16)
    for dtype in (F32, BF16):
        total, apart = torch.randn(40, 70).to(dtype), poisoned((40, 70), dtype)
        run(a, b, apart, total)
        run(a, b, total, total)
        assert_bits(total, apart, "total")


def test_threads_do_not_change_the_bits(build):
    a, b, found = torch.randn(150, 70).to(BF16), torch.randn(70, 100).to(BF16), []
    for threads in (1, 2, 5, 8):
        torch.set_num_threads(threads)
        found.append(poisoned((150, 100), BF16))
        run(a, b, found[-1])
    for each in found[1:]:
        assert_bits(each, found[0], "out")


def test_what_is_not_finite_stays_in_its_row_and_column(build):
    a, b, out = torch.randn(40, 37).to(BF16), torch.randn(37, 40).to(BF16), poisoned((40, 40), BF16)
    a[3, 36], a[5, 0], b[2, 39] = float("nan"), float("inf"), float("-inf")
    run(a, b, out)
    bad = ~out.isfinite()
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[3], expected[5], expected[:, 39] = True, True, True
    assert torch.equal(bad, expected)


def test_nothing_times_nothing(build):
    out = torch.ones(3, 4)
    run(torch.empty(3, 0, dtype=BF16), torch.empty(0, 4, dtype=BF16), out)
    assert torch.equal(out, torch.zeros(3, 4))
    run(torch.empty(0, 5, dtype=BF16), torch.ones(5, 4, dtype=BF16), torch.empty(0, 4))


@pytest.mark.parametrize("grads", CHUNKED)
def test_cross_entropy_by_chunks(build, grads, monkeypatch):
    """Two chunks whose sum is rounded once, and one chunk alone."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", 4)
    for together in (False, True):
        monkeypatch.setattr(loss, "_chunk", lambda count, *_, all_of_it=together: count if all_of_it else 8)
        for case in CHUNKED[grads]:
            case.check(PLANNED, "linear_cross_entropy", BF16)


def test_a_plan_says_which_product_runs(build):
    for dtype, label in ((BF16, amx.LABEL), (F32, "aten mm")):
        ins = (torch.randn(4, 8).to(dtype), torch.randn(3, 8).to(dtype), None)
        assert PLANNED.lower(node_of("linear", ins, {})).label == label
