"""cached_attention and paged_attention on Triton against float64: few and many new tokens, one split and several."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton import attention, decode, tuned
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import decode as kernels
from tests.backends.cuda_triton.mutate import fails, mutated
from tests.backends.cuda_triton.test_attention import SHORT, Case, plain
from tests.tolerances import assert_close

PAGE = 8


def generated() -> list[Case]:
    """40 cases of a seed; `keys` is how much of the cache is filled."""
    draw = random.Random(7)
    return [
        Case(
            batch=draw.choice((1, 1, 2)),
            heads=draw.choice(((1, 1), (2, 1), (4, 2), (3, 1), (2, 2))),
            queries=(queries := draw.choice((1, 1, 1, 2, 5, 16, 20))),
            keys=queries + draw.choice((0, 1, 7, 30, 64, 100)),
            dim=(8, 10, 16, 64, 80, 96, 128, 256)[number % 8],
            window=draw.choice((0, 0, 1, 9, 40)),
            cap=draw.choice((0.0, 0.0, 5.0)),
            sinks=draw.random() < 0.4,
            pad=draw.choice(("", "", "left", "holes")),
            dtype=draw.choice(("float32", "bfloat16", "float16")),
            spread=draw.choice((1.0, 3.0)),
        )
        for number in range(40)
    ]


CASES = [
    *generated(),
    Case(queries=1, keys=1, sinks=True),
    Case(queries=1, keys=129, heads=(16, 1), dim=64, dtype="bfloat16"),
    Case(queries=1, keys=128, window=128, dim=64),
    Case(queries=16, keys=16, heads=(8, 2), dtype="bfloat16"),
    Case(queries=3, keys=100, window=300, cap=3.0),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 keys, so that a test's few are several splits of several tiles."""

    def options(kernel: str, shape_class: str, **_: object) -> dict:
        shape = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
        return shape if kernel == "attention_decode" else {"BLOCK_M": 16, **shape}

    if attention.common.INTERPRETED.value:
        monkeypatch.setattr(tuned, "options", options)


def arrays(case: Case, rand: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k, v of the filled places, key mask, sinks."""
    dtype = SHORT[case.dtype]
    q = rand(case.batch, case.queries, case.heads[0], case.dim, dtype=dtype, scale=case.spread).transpose(1, 2)
    k, v = (rand(case.batch, case.heads[1], case.keys, case.dim, dtype=dtype) for _ in range(2))
    key_mask = None
    if case.pad:
        place = torch.arange(case.keys, device=q.device)
        key_mask = (place >= case.keys // 3 if case.pad == "left" else place % 3 != 1).repeat(case.batch, 1)
    return q, k, v, key_mask, rand(case.heads[0]) if case.sinks else None


def attrs(case: Case) -> dict:
    return {"scale": case.dim**-0.5, "window": case.window, "cap": case.cap}


def cached(case: Case, rand: Callable[..., Tensor], capacity: int) -> None:
    """Of a cache of NaN, but for the filled places: what is read past them shows."""
    q, k, v, key_mask, sinks = arrays(case, rand)
    shape = (case.batch, case.heads[1], capacity, case.dim)
    caches = [torch.full(shape, float("nan"), dtype=q.dtype, device=q.device) for _ in range(2)]
    for cache, filled in zip(caches, (k, v), strict=True):
        cache[:, :, : case.keys] = filled
    seen = None
    if key_mask is not None:
        seen = torch.ones(case.batch, capacity, dtype=torch.bool, device=q.device)
        seen[:, : case.keys] = key_mask
    length = torch.tensor(case.keys, device=q.device)
    y = apply("cached_attention", q, *caches, seen, length, sinks, **attrs(case))
    given = (sinks, case, (key_mask, None, None))
    assert_close("y", y, plain(q.double(), k.double(), v.double(), *given)[0], plain(q, k, v, *given)[0])


def paged(case: Case, rand: Callable[..., Tensor]) -> None:
    """Sequences of several lengths, their pages in a shuffled order; pages that are nobody's are NaN."""
    q, k, v, _, sinks = arrays(case, rand)
    lengths = torch.tensor([max(case.queries, case.keys - 5 * n) for n in range(case.batch)], device=q.device)
    pages = -(-case.keys // PAGE)
    order = torch.randperm(3 * case.batch * pages, generator=torch.Generator().manual_seed(1))[: case.batch * pages]
    table = order.view(case.batch, pages).to(q.device, torch.int32)
    shape = (3 * case.batch * pages, case.heads[1], PAGE, case.dim)
    stores = [torch.full(shape, float("nan"), dtype=q.dtype, device=q.device) for _ in range(2)]
    for b, length in enumerate(lengths.tolist()):
        for store, filled in zip(stores, (k, v), strict=True):
            for place in range(length):
                store[table[b, place // PAGE].long(), :, place % PAGE] = filled[b, :, place]
    y = apply("paged_attention", q, *stores, table, lengths.to(torch.int32), sinks, **attrs(case))
    for b, length in enumerate(lengths.tolist()):
        one = (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        given = (sinks, case, (None, None, None))
        reference = plain(*(x.double() for x in one), *given)[0]
        assert_close(f"y[{b}]", y[b : b + 1], reference, plain(*one, *given)[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cached_attention_is_within_the_derived_bound(rand, case):
    cached(case, rand, capacity=case.keys + 27)


@pytest.mark.parametrize("case", [replace(case, pad="") for case in CASES[::2]], ids=str)
def test_paged_attention_is_within_the_derived_bound(rand, case):
    paged(case, rand)


def test_splits_are_a_function_of_shapes():
    """Enough programs for a GPU, and never a run of less than two tiles."""
    assert decode.splits(8, 8192, 64) == 64
    assert decode.splits(1, 128, 64) == 1
    assert decode.splits(1, 256, 64) == 2
    assert decode.splits(300, 8192, 64) == 1


def test_one_split_and_many_agree(rand, monkeypatch):
    """Queries of a group are rows of one tile; several tiles where there are more than 64."""
    case = Case(heads=(6, 1), queries=13, keys=90, dim=32, sinks=True)
    q, k, v, _, sinks = arrays(case, rand)
    length = torch.tensor(case.keys, device=q.device)
    many = apply("cached_attention", q, k, v, None, length, sinks, **attrs(case))
    monkeypatch.setattr(decode, "PROGRAMS", 1)
    one = apply("cached_attention", q, k, v, None, length, sinks, **attrs(case))
    torch.testing.assert_close(one, many, rtol=2.0**-20, atol=2.0**-22)


MUTATIONS = {
    "no max subtraction": {"peak = tl.maximum(m, tl.max(s, axis=1) * factor)": "peak = m * 0.0"},
    "a skipped split": {"first + split * share": "first + tl.maximum(split, 1) * share"},
    "an ignored window": {"seen = seen & (key[None, :] >= high[:, None] - WINDOW)": "seen = seen"},
    "splits joined without rescaling": {"other=0.0) * rescale[:, None], axis=0)": "other=0.0), axis=0)"},
    "a dropped sink": {"total += tl.exp2(sink - peak)": "total += 0.0"},
    "the wrong query head": {"head = kv_head * GROUP + ": "head = "},
    "a stale length": {"filled = tl.load(length": "filled = 2 + tl.load(length"},
    "new tokens that see each other's future": {"- queries + token + 1": "- queries + token + 2"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_found(rand, monkeypatch, tmp_path, name):
    case = Case(heads=(4, 2), queries=2, keys=100, window=70, sinks=True, spread=80.0 if "max" in name else 1.0)
    cached(case, rand, capacity=120)
    monkeypatch.setattr(decode, "kernels", mutated(kernels, MUTATIONS[name], tmp_path))
    assert fails(lambda: cached(case, rand, capacity=120)), name
