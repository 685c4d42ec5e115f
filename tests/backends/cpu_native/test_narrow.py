"""An adapter's products: every build's sums within Higham's bound of the float64 value, by any number of threads, of
rows and columns of wider arrays, beside which nothing is written; and which products a plan gives to whom."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from smedjan.backends.cpu_native import PLANNED, amx, native
from smedjan.backends.cpu_native.narrow import MOST, Aten, Native
from smedjan.backends.planned.immediate import immediate, node_of
from tests.tolerances import UNIT_ROUNDOFF

DTYPES = [torch.float32, torch.bfloat16]


def generated() -> list[tuple[int, int, int]]:
    """Rows, columns, ranks: ends of tiles (6 to 16 rows, 1 to 4 vectors), strips (64), blocks (64, 96, 256), chance."""
    chance = random.Random(7)
    found = [(rows, 35, 5) for rows in (0, 1, 5, 6, 7, 12, 13, 16, 17, 63, 64, 65, 95, 96, 97, 129)]
    found += [(7, columns, 3) for columns in (1, 2, 15, 16, 17, 48, 63, 64, 65, 191, 192, 193, 255, 256, 257, 600)]
    found += [(19, 70, ranks) for ranks in (1, 2, 8, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 127, 128, 255, 256)]
    found += [(40, 2100, 16), (40, 700, 48), (300, 130, 256), (21, 290, 250)]
    while len(found) < 80:
        found.append((chance.randrange(1, 140), chance.randrange(1, 420), chance.randrange(1, 80)))
    return found


def within(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Columns in the middle of a wider array, and that array."""
    rows, columns = shape
    whole = torch.randn(rows, columns + 9, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)
    return whole[:, 4 : 4 + columns], whole


def play(method, *products) -> None:
    run = immediate(torch.device("cpu"))
    method(run, products)
    for call in run.calls:
        call()


def check(name: str, method, a: Tensor, b: Tensor, out: Tensor, whole: Tensor, factor: float) -> None:
    """out = factor a b, and out before it where that is added to; out lies in `whole`.

    |error| <= (n + 3) u |factor| |a| |b| + 3 u |out before| in float32: sums of n terms in any order, the factor and
    the sum (Higham 2002, eq. 3.5); and a rounding to out's dtype.
    """
    first = a.t() if method is Native.outer else a
    true, size = factor * (first.double() @ b.double()), abs(factor) * (first.double().abs() @ b.double().abs())
    size *= first.shape[1] + 3
    if method is Native.expand:
        true, size = true + out.double(), size + 3 * out.double().abs()
    else:
        out.fill_(float("nan"))
    before = whole.clone()
    play(method, (a, b, out, factor))
    bound = 1.01 * UNIT_ROUNDOFF[torch.float32] * size
    if out.dtype != torch.float32:
        bound = bound + UNIT_ROUNDOFF[out.dtype] * (true.abs() + bound)
    wrong = ~((out.double() - true).abs() <= bound)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {list(out.shape)}, {wrong.nonzero()[:3].tolist()}"
    out.copy_(before.as_strided(out.shape, out.stride(), out.storage_offset()))
    assert torch.equal(whole.nan_to_num(), before.nan_to_num()), f"{name}: wrote beside its columns"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_build_is_within_the_bound(build, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, columns, ranks in generated():
            name = f"{rows} x {columns}, {ranks} ranks"
            (x, _), (low, _) = within(rows, columns, dtype=dtype), within(rows, ranks, seed=1)
            a, b = torch.randn(ranks, columns), torch.randn(columns, ranks)
            for way, p in (("A^T", a.t()), ("B", b)):
                check(f"reduce {name} {way}", Native.reduce, x, p, *within(rows, ranks), -0.7)
            for way, p in (("A", a), ("B^T", b.t())):
                check(f"expand {name} {way}", Native.expand, low, p, *within(rows, columns, dtype=dtype, seed=3), 1.3)
            check(f"outer {name}", Native.outer, low, x, a, a, 0.5)
            check(f"outer {name}, transposed", Native.outer, low, x, b.t(), b, 0.5)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_reaches_its_own_row_or_column(build):
    x = torch.randn(21, 70)
    x[3, 5], x[9, 69] = float("nan"), float("inf")
    p, low, out = torch.ones(70, 4), torch.empty(21, 4), torch.empty(4, 70)
    play(Native.reduce, (x, p, low, 1.0))
    assert (~low.isfinite()).any(1).nonzero().flatten().tolist() == [3, 9]
    play(Native.outer, (torch.ones(21, 4), x, out, 1.0))
    assert (~out.isfinite()).any(0).nonzero().flatten().tolist() == [5, 69]


def _label(ranks: int, dtype: torch.dtype = torch.float32) -> str:
    ins = (
        torch.ones(2, 12, dtype=dtype),
        torch.ones(7, 12, dtype=dtype),
        None,
        torch.ones(ranks, 12),
        torch.ones(7, ranks),
    )
    return PLANNED.lower(node_of("lora_linear", ins, {"scaling": 1.0})).label


def test_a_plan_says_whose_products_they_are(monkeypatch):
    for dtype in DTYPES:
        most = MOST[str(dtype).removeprefix("torch.")]
        base = amx.LABEL if dtype == torch.bfloat16 and amx.available() else "aten mm"
        assert _label(most, dtype) == f"{base} + {Native.label}"
        assert _label(most + 1, dtype) == f"{base} + {Aten.label}"
    monkeypatch.setattr(native, "available", lambda: False)
    assert _label(3) == f"aten mm + {Aten.label}"
