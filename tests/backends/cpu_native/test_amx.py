"""Products on AMX's tiles, of bfloat16 and of float32 in three terms, by instructions and by the plain loops that stand
for them: within bound of float64 for any layout, edge and part; nothing is read or written beside the operands; who
shares the work changes no bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from smedjan.backends.cpu_native import PLANNED, amx, amx_float32, loss
from smedjan.backends.planned.immediate import node_of
from smedjan.backends.planned.launch import Launches
from tests.backends.cpu_native.conftest import loaded, poisoned
from tests.backends.cpu_native.fused_cases import CHUNKED, GROUPS, LORA
from tests.conftest import assert_bits
from tests.tolerances import assert_close

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(params=["this CPU's", "portable"])
def build(request, monkeypatch):
    with loaded(request.param, monkeypatch):
        if not amx.available():
            pytest.skip("no AMX")
        yield request.param


OF = {BF16: amx.product, F32: amx_float32.product}
"""By the dtype of operands."""
RESULTS = [(BF16, F32), (BF16, BF16), (F32, F32)]
LINEAR = {name: each for name, each in GROUPS.items() if "linear" in each[0]}
LINEAR |= {name: ("lora_linear", case) for name, case in LORA.items()}


def run(a: Tensor, b: Tensor, out: Tensor, plus: Tensor | None = None) -> None:
    made = Launches(torch.device("cpu"), scratch=poisoned, host=None, allocate=None)  # type: ignore[arg-type]
    OF[a.dtype](made, a, b, out, plus=plus)
    for each in made.calls:
        each()


def inside(x: Tensor, pad: int) -> Tensor:
    """x in a wider array of NaN."""
    wide = poisoned((x.shape[0], x.shape[1] + pad), x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def operand(draw: random.Random, rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in rows or in columns, which may lie apart."""
    turned, pad = draw.random() < 0.5, draw.choice([0, 3, 16])
    shape = (columns, rows) if turned else (rows, columns)
    made = inside(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype), pad)
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


@pytest.mark.parametrize(("of", "dtype"), RESULTS, ids=str)
def test_products(build, of, dtype):
    draw = random.Random(7)
    for number, (rows, columns, depth) in enumerate(shapes()):
        a, b = operand(draw, rows, depth, number, of), operand(draw, depth, columns, number + 1000, of)
        plus = (None, torch.randn(columns).to(dtype), inside(torch.randn(rows, columns).to(dtype), 2))[number % 3]
        torch.set_num_threads(draw.choice([1, 2, 3, 4]))
        check(f"{rows} x {depth} x {columns}, strides {a.stride()} {b.stride()}", a, b, dtype, plus)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("of", OF, ids=str)
def test_a_long_depth_in_parts(build, of, turned, monkeypatch):
    """Of more rows than those whose sums wait, or which are in tiles at a time; by threads that have a part each."""
    monkeypatch.setattr(amx, "WHOLE", 64)
    monkeypatch.setattr(amx, "PART", 48)
    monkeypatch.setattr(amx_float32, "PART", 48)
    monkeypatch.setattr(amx_float32, "OPERAND_BYTES", 500 * 64 * 6)
    a = torch.randn(130, 1100, generator=torch.Generator().manual_seed(1)).to(of).t()
    a = a if turned else a.contiguous()
    b = torch.randn(130, 170, generator=torch.Generator().manual_seed(2)).to(of)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for plus in (None, torch.randn(170), torch.randn(1100, 170)):
            check(f"{threads} threads", a, b, F32, plus)


@pytest.mark.parametrize(("of", "dtype"), RESULTS, ids=str)
def test_a_total_is_added_to_where_it_lies(build, of, dtype, monkeypatch):
    monkeypatch.setattr(amx_float32, "PART", 32)
    a, b = torch.randn(40, 50).to(of), torch.randn(50, 70).to(of)
    for _ in range(2):
        total, apart = torch.randn(40, 70).to(dtype), poisoned((40, 70), dtype)
        run(a, b, apart, total)
        run(a, b, total, total)
        assert_bits(total, apart, "total")


@pytest.mark.parametrize("of", OF, ids=str)
def test_threads_do_not_change_the_bits(build, of):
    a, b, found = torch.randn(150, 70).to(of), torch.randn(70, 100).to(of), []
    for threads in (1, 2, 5, 8):
        torch.set_num_threads(threads)
        found.append(poisoned((150, 100), of))
        run(a, b, found[-1])
    for each in found[1:]:
        assert_bits(each, found[0], "out")


@pytest.mark.parametrize("of", OF, ids=str)
def test_plain_loops_give_the_bits_of_the_instructions(of, monkeypatch):
    a, b, found = torch.randn(100, 170).to(of), torch.randn(170, 70).to(of), []
    for name in ("this CPU's", "portable"):
        with loaded(name, monkeypatch):
            if not amx.available():
                pytest.skip("no AMX")
            found.append(poisoned((100, 70), F32))
            run(a, b, found[-1])
    assert_bits(found[1], found[0], "out")


@pytest.mark.parametrize("of", OF, ids=str)
def test_what_is_not_finite_stays_in_its_row_and_column(build, of):
    a, b, out = torch.randn(40, 37).to(of), torch.randn(37, 40).to(of), poisoned((40, 40), of)
    a[3, 36], a[5, 0], b[2, 39] = float("nan"), float("inf"), float("-inf")
    run(a, b, out)
    bad = ~out.isfinite()
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[3], expected[5], expected[:, 39] = True, True, True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("of", OF, ids=str)
def test_nothing_times_nothing(build, of):
    for plus in (None, torch.arange(4.0)):
        out = torch.ones(3, 4)
        run(torch.empty(3, 0, dtype=of), torch.empty(0, 4, dtype=of), out, plus)
        assert torch.equal(out, torch.zeros(3, 4) if plus is None else plus.expand(3, 4))
    run(torch.empty(0, 5, dtype=of), torch.ones(5, 4, dtype=of), torch.empty(0, 4))


@pytest.mark.parametrize("depth", [1, 31, 576])
def test_each_sum_of_float32_is_as_near_as_its_terms_allow(build, depth):
    """Numbers of twenty orders of magnitude. What six of nine products leave out is at most (2^-23 + 2^-32) |a| |b|,
    and no number goes into a sum that is rounded more than max(depth, 32) times: 16 in a tile, then twelve for each 32
    of the depth."""
    draw = torch.Generator().manual_seed(depth)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * 10.0 ** (20 * torch.rand(shape, generator=draw) - 10)

    a, b, out = numbers(70, depth), numbers(depth, 90), poisoned((70, 90), F32)
    run(a, b, out)
    most = (2.0**-23 + 2.0**-32 + max(depth, 32) * 2.0**-24) * (a.double().abs() @ b.double().abs())
    assert ((out.double() - a.double() @ b.double()).abs() <= most).all()


def test_float32_that_three_terms_hold_is_exact(build):
    """Products of one nonzero number each: all nine of its terms' products but the last three, which are zero here."""
    draw = torch.Generator().manual_seed(3)
    a = torch.randint(-(2**23), 2**23, (40, 1), generator=draw).float()
    b = (2.0 ** torch.randint(-20, 20, (1, 40), generator=draw)).float()
    out = poisoned((40, 40), F32)
    run(a, b, out)
    assert torch.equal(out, a @ b)
    run(b.t(), a.t(), out)
    assert torch.equal(out, b.t() @ a.t())


@pytest.mark.parametrize("name", LINEAR)
def test_every_rule_of_products_of_float32(build, name, monkeypatch):
    monkeypatch.setattr(amx_float32, "LEAST", 1)
    op, case = LINEAR[name]
    case.check(PLANNED, op, F32)
    labels = {call.label for call in case.program(PLANNED, F32, exact=False).calls}
    assert any(label.startswith(amx_float32.LABEL) for label in labels), labels


@pytest.mark.parametrize("dtype", OF, ids=str)
@pytest.mark.parametrize("grads", CHUNKED)
def test_cross_entropy_by_chunks(build, dtype, grads, monkeypatch):
    """Two chunks whose sum is rounded once, and one chunk alone."""
    monkeypatch.setattr(amx_float32, "LEAST", 1)
    monkeypatch.setattr(loss, "CHUNK_ROWS", 4)
    for together in (False, True):
        monkeypatch.setattr(loss, "_chunk", lambda count, *_, all_of_it=together: count if all_of_it else 8)
        for case in CHUNKED[grads]:
            case.check(PLANNED, "linear_cross_entropy", dtype)


def test_a_plan_says_which_product_runs(build, monkeypatch):
    for dtype, size, label in ((BF16, 8, amx.LABEL), (F32, 8, "aten mm"), (F32, amx_float32.LEAST, amx_float32.LABEL)):
        ins = (torch.randn(100, size).to(dtype), torch.randn(110, size).to(dtype), None)
        node = node_of("linear", ins, {})
        assert PLANNED.lower(node).label == label
        with monkeypatch.context() as patched:
            patched.setenv(amx_float32.SWITCH, "0")
            assert PLANNED.lower(node).label == (label if dtype == BF16 else "aten mm")
