"""Rows by index and their gradients on Triton against float64 torch."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton import embedding
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.ops.embedding import embedding as embedding_op
from smedjan.ops.embedding import take_rows as take_rows_op
from tests.backends.cpu_native.fused_cases import Case
from tests.backends.cuda_triton.edited import edited
from tests.backends.cuda_triton.shapes import DTYPES, into, laid_out
from tests.tolerances import assert_close


def drawn() -> list[tuple[int, int, int, int, int | None]]:
    """(batch, tokens, vocabulary, width, padding): one token, all of one id, each id once at most, and others."""
    draw = random.Random(21)
    corners = [
        (1, 1, 5, 1, None),
        (1, 1, 5, 33, 0),
        (1, 70, 1, 17, None),
        (1, 70, 1, 17, 0),
        (2, 140, 3, 8, None),
        (1, 33, 1000, 64, None),
        (3, 11, 7, 576, 6),
    ]
    return corners + [
        (
            draw.randint(1, 3),
            draw.choice([1, 2, 5, 31, 32, 33, 64]),
            draw.choice([1, 2, 7, 50, 300]),
            draw.choice([1, 2, 7, 16, 33, 130]),
            draw.choice([None, 0]),
        )
        for _ in range(40 - len(corners) + 5)
    ]


def gradient(dy: Tensor, ids: Tensor, vocab: int, padding: int | None) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, ids, vocab, -1 if padding is None else padding, False)


@pytest.mark.parametrize(("number", "drawing"), enumerate(drawn()), ids=[str(case) for case in drawn()])
def test_embedding_and_its_gradient(rand, device, number, drawing):
    batch, tokens, vocab, width, padding = drawing
    dtype = DTYPES[number % 3]
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(vocab, (batch, tokens), generator=generator).to(device)
    weight = rand(vocab, width, dtype=dtype)
    assert torch.equal(apply("embedding", ids, weight, padding_idx=padding), weight[ids])
    dy = rand(batch, tokens, width, dtype=dtype)
    dy = laid_out(dy, "part") if number % 2 and batch == 1 else dy
    made = apply("embedding_bwd", dy, ids, vocab_size=vocab, padding_idx=padding)
    assert made.dtype == dtype
    assert_close("dweight", made, gradient(dy.double(), ids, vocab, padding), gradient(dy, ids, vocab, padding))
    if number % 3 == 0:
        case = Case(lambda i, w: embedding_op(i, w, padding_idx=padding), {"i": ids, "w": rand(vocab, width)}, ("w",))
        case.check(RULES, "embedding_bwd", DTYPES[number // 3 % 3])


@pytest.mark.parametrize("number", range(40))
def test_rows_and_their_gradient(rand, device, number):
    draw = random.Random(number)
    size, width, dtype = draw.choice([1, 3, 16, 33]), draw.choice([1, 7, 64, 130, 576]), DTYPES[number % 3]
    rows = torch.tensor(draw.sample(range(size), draw.randint(1, size)), device=device)
    x = laid_out(rand(size, width, dtype=dtype), "part" if number % 2 else "whole")
    assert torch.equal(apply("take_rows", x, rows), x[rows])
    dy = rand(len(rows), width, dtype=dtype)
    expected = torch.zeros(size, width, dtype=dtype, device=device).index_copy_(0, rows, dy)
    assert torch.equal(apply("take_rows_bwd", dy, rows, size=size), expected)
    Case(take_rows_op, {"x": rand(size, width), "rows": rows}, ("x",)).check(RULES, "take_rows_bwd", dtype)


def test_a_gradient_is_the_same_on_every_run_and_in_every_other_order_of_ids(rand, device, same):
    """Which rows they are is nothing to the sums: only the order of tokens is."""
    ids = torch.randint(6, (2, 50), generator=torch.Generator().manual_seed(1)).to(device)
    dy = rand(2, 50, 33)
    made = apply("embedding_bwd", dy, ids, vocab_size=6, padding_idx=None)
    same(apply("embedding_bwd", dy, ids, vocab_size=6, padding_idx=None), made)
    same(apply("embedding_bwd", dy, 5 - ids, vocab_size=6, padding_idx=None), made.flip(0))


def test_no_token(rand, device):
    ids = torch.zeros(1, 0, dtype=torch.int64, device=device)
    assert apply("embedding", ids, rand(5, 3), padding_idx=None).shape == (1, 0, 3)
    assert not apply("embedding_bwd", rand(1, 0, 3), ids, vocab_size=5, padding_idx=None).any()


def test_what_runs(rand, device):
    ids, dy = torch.zeros(1, 9, dtype=torch.int64, device=device), rand(1, 9, 33)
    attrs = {"vocab_size": 5, "padding_idx": None}
    assert into("embedding_bwd", (rand(5, 33),), dy, ids, **attrs) == ["memset", "rank", "sum_rows"]


def ranked(kernels: ModuleType, ids: Tensor) -> tuple[Tensor, Tensor]:
    """order and id_at, with room for a place too many."""
    tokens = ids.numel()
    order, id_at = (torch.full((tokens + 1,), -7, dtype=torch.int32, device=ids.device) for _ in range(2))
    tile = embedding.RANK
    kernels.rank[(-(-tokens // tile.rows),)](ids, order, id_at, tokens, TOKENS=tile.rows, OTHERS=tile.cols)
    return order[:tokens], id_at[:tokens]


def drawn_ids(tokens: int, vocab: int, device: str) -> Tensor:
    return torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(tokens)).to(device)


@pytest.mark.parametrize(
    ("tokens", "vocab"), [(1, 1), (31, 3), (32, 1), (33, 100), (128, 9), (300, 5), (257, 2**31 - 1)]
)
def test_ranks_are_a_stable_sort(device, tokens, vocab):
    ids = drawn_ids(tokens, vocab, device)
    order, id_at = ranked(embedding.kernels, ids)
    values, places = ids.sort(stable=True)
    assert torch.equal(order.long(), places)
    assert torch.equal(id_at.long(), values)


RANK_MUTATIONS = {
    "a token is before itself": ("other[None, :] < token[:, None]", "other[None, :] <= token[:, None]"),
    "smaller ids are not counted": ("(smaller | earlier)", "earlier"),
    "the last token is not counted": ("& (other < tokens)", "& (other < tokens - 1)"),
}


@pytest.mark.parametrize("name", RANK_MUTATIONS)
def test_a_fault_of_the_ranks_shows(device, tmp_path, name):
    """By themselves: a sum over places that nobody took would read anywhere."""
    ids = drawn_ids(70, 5, device)
    ids[-1] = 0
    order, _ = ranked(edited(embedding.kernels, *RANK_MUTATIONS[name], tmp_path), ids)
    assert not torch.equal(order.long(), ids.sort(stable=True).indices)


MUTATIONS = {
    "a duplicate is skipped": ("place += TOKENS", "place += TOKENS + 1"),
    "only the first tile of a run": ("more = tl.min(same.to(tl.int32), axis=0)", "more = 0"),
    "the last columns are dropped": ("same[:, None] & (col < width)", "same[:, None] & (col < width - 1)"),
    "padding has a gradient": (" & (mine != padding)", ""),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_breaks_the_bound(rand, device, monkeypatch, tmp_path, name):
    ids = torch.randint(3, (1, 70), generator=torch.Generator().manual_seed(1)).to(device)
    dy = rand(1, 70, 33)

    def check() -> None:
        made = apply("embedding_bwd", dy, ids, vocab_size=3, padding_idx=1)
        assert_close("dweight", made, gradient(dy.double(), ids, 3, 1), gradient(dy, ids, 3, 1))

    check()
    monkeypatch.setattr(embedding, "kernels", edited(embedding.kernels, *MUTATIONS[name], tmp_path))
    with pytest.raises(AssertionError, match="> bound"):
        check()
