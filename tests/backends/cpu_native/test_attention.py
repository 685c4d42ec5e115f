"""Compiled attention of plans: as near the float64 value as plain torch calls are, at the edges of tiles, with every
mask, from every build of the kernels, by any number of threads and however work is shared out."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor as Array

from smedjan.backends.cpu_native import PLANNED, amx, attention, native
from smedjan.backends.planned.immediate import node_of
from smedjan.graph.tensor import Tensor
from smedjan.ops import attention as att
from tests.backends.cpu_native.conftest import loaded
from tests.backends.cpu_native.fused_cases import Case
from tests.conftest import assert_bits
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16]
SEEN = ("causal", "none", "padded", "packed", "window")
ATTRS = {"implementation": "sdpa", "cap": 0.0, "softmax_dtype": "float32"}


@pytest.fixture(params=["this CPU's", "no AVX-512", "portable"])
def build(request, monkeypatch):
    with loaded(request.param, monkeypatch):
        yield request.param


def case(
    batch: int, heads: int, groups: int, seq: int, dim: int, seen: str, *, cap: float = 0.0, seed: int = 0
) -> Case:
    """Heads lie inside, as projections give them."""
    generator = torch.Generator().manual_seed(seed)
    arrays = {
        name: torch.randn(batch, seq, each, dim, generator=generator)
        for name, each in (("q", heads), ("k", groups), ("v", groups))
    }
    if seen == "padded":
        arrays["m"] = torch.ones(batch, seq, dtype=torch.bool)
        arrays["m"][0, seq - seq // 3 :] = False
    if seen in ("packed", "window"):
        ends = torch.rand(batch, seq, generator=generator) < (4 / seq if seen == "packed" else 0)
        arrays["m"] = ends.long().cumsum(-1)

    def built(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Tensor:
        if m is not None:
            made = att.padding_mask(m, queries=seq) if seen == "padded" else None
            m = made or att.document_mask(m, window=1 + seq // 3 if seen == "window" else 0)
        q, k, v = (att.swap_heads(x) for x in (q, k, v))
        implementation = "eager" if cap else "sdpa"
        attrs = {"causal": seen == "causal" and not cap, "scale": dim**-0.5, "implementation": implementation}
        return att.swap_heads(att.attention(q, k, v, m, cap=cap, **attrs))

    return Case(built, arrays, ("q", "k", "v"))


def generated() -> list[tuple[int, int, int, int, int, str]]:
    """Batch, query heads, key heads, tokens, head dim, mask: ends of blocks (8), vectors (16), tiles (64); chance."""
    chance = random.Random(7)
    found = [(4, 8, 4, seq, 16, "causal") for seq in (2, 7, 8, 9, 16, 17, 63, 64, 65, 128, 129)]
    found += [(2, 3, 3, 70, dim, seen) for dim in (1, 15, 16, 31, 33, 48, 64, 80) for seen in ("none", "causal")]
    found += [(2, 8, 1, 200, 128, "packed"), (1, 3, 1, 130, 256, "causal"), (2, 3, 3, 193, 64, "window")]
    while len(found) < 48:
        groups = chance.choice((1, 2, 3))
        heads, seq = groups * chance.choice((1, 3, 8)), chance.randrange(2, 200)
        found.append((chance.choice((2, 3, 4)), heads, groups, seq, chance.randrange(1, 70), chance.choice(SEEN)))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_build_is_as_near_as_torch(build, dtype):
    for at, sizes in enumerate(generated()):
        torch.set_num_threads(1 + at % 3)
        case(*sizes, seed=at).check(PLANNED, "attention_bwd", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seen", ["none", "padded", "packed"])
def test_a_softcap(build, seen, dtype):
    for sizes in ((2, 6, 2, 37, 16), (1, 2, 1, 130, 33)):
        case(*sizes, seen, cap=1.5).check(PLANNED, "attention_bwd", dtype)


def lowered(op: str, ins: tuple, attrs: dict):
    rule = PLANNED.lower(node_of(op, ins, attrs))
    assert rule.label == "native attention"
    return rule.run(*ins, **attrs)


def formula(dy: Array, q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, ...]:
    """y and the gradients of q, k and v, of the op's own operands: y and lse, rounded as they are, in their places.
    What lies between products is float32 at least; a query that sees no key has y = 0."""
    times, scale, dtype = q.shape[1] // k.shape[1], q.shape[3] ** -0.5, q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    many_k, many_v = (x.repeat_interleave(times, 1) for x in (k, v))
    scores = (scale * (q @ many_k.transpose(2, 3)).to(wide)).masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1, keepdim=True)
    shares = (scores - lse).exp().masked_fill(~mask, 0)
    y = shares.to(dtype) @ many_v
    passed = (dy @ many_v.transpose(2, 3)).to(wide) - (dy.to(wide) * y.to(wide)).sum(-1, keepdim=True)
    dscores = (shares * passed * scale).to(dtype)
    of_heads = dscores.transpose(2, 3) @ q, shares.to(dtype).transpose(2, 3) @ dy
    dk, dv = (x.to(wide).unflatten(1, (-1, times)).sum(2).to(dtype) for x in of_heads)
    return y, dscores @ many_k, dk, dv


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing_and_keys_that_nobody_sees(build, dtype):
    """Masks without any order, of a row or a head each, one query, and more keys than queries."""
    chance = torch.Generator().manual_seed(3)
    for at, (queries, keys, of_heads) in enumerate(((70, 70, 1), (1, 40, 1), (20, 150, 4), (130, 5, 4))):
        torch.set_num_threads(1 + at % 3)
        shapes = ((2, 4, queries, 24), (2, 2, keys, 24), (2, 2, keys, 24), (2, 4, queries, 24))
        q, k, v, dy = (torch.randn(shape, generator=chance).to(dtype) for shape in shapes)
        mask = torch.rand(2, of_heads, queries, keys, generator=chance) < 0.2
        mask[0, :, queries // 3 :] = False
        mask[1, :, :, keys // 2] = False
        attrs = {"causal": False, "scale": 24**-0.5, **ATTRS}
        y, lse = lowered("attention", (q, k, v, mask), attrs)
        found = (y, *lowered("attention_bwd", (dy, q, k, v, mask, y, lse), attrs))
        plain = formula(dy, q, k, v, mask)
        wide = formula(*(x.double() for x in (dy, q, k, v)), mask)
        for name, mine, theirs, reference in zip(("y", "dq", "dk", "dv"), found, plain, wide, strict=True):
            assert_close(f"{name} of {queries} x {keys}", mine, reference, theirs)
        blind = ~mask.any(-1).expand(2, 4, queries)
        assert not y[blind].any()
        assert not found[1][blind].any()
        assert torch.equal(lse == float("-inf"), blind)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_lse_is_the_scores_own(build, threads):
    torch.set_num_threads(threads)
    q, k, v = (torch.randn(2, 3, 100, 20, generator=torch.Generator().manual_seed(at)) for at in range(3))
    _, lse = lowered("attention", (q, k, v, None), {"causal": True, "scale": 3.0, **ATTRS})
    seen = torch.ones(100, 100, dtype=torch.bool).tril()
    reference, plain = (
        torch.logsumexp((3.0 * q.to(dtype) @ k.to(dtype).transpose(2, 3)).masked_fill(~seen, float("-inf")), -1)
        for dtype in (torch.float64, torch.float32)
    )
    assert_close("lse", lse, reference, plain)


def test_work_is_split_where_threads_would_idle():
    assert not attention.split(24, 2)
    assert not attention.split(3, 2)
    assert attention.split(1, 2)
    assert attention.split(24, 64)


def test_threads_do_not_change_the_bits(build):
    """As long as they do not change how work is split."""
    q, k, v, dy = (torch.randn(5, 4, 150, 32, generator=torch.Generator().manual_seed(at)) for at in range(4))
    attrs, found = {"causal": True, "scale": 0.2, **ATTRS}, []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        y, lse = lowered("attention", (q, k, v, None), attrs)
        found.append((y, lse, *lowered("attention_bwd", (dy, q, k, v, None, y, lse), attrs)))
    for each in found[1:]:
        for one, other in zip(each, found[0], strict=True):
            assert_bits(one, other, "a result")


def test_without_a_compiler_aten_runs(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    q = torch.randn(1, 2, 5, 8)
    attrs = {"causal": True, "scale": 0.2, **ATTRS}
    assert PLANNED.lower(node_of("attention", (q, q, q, None), attrs)).label == "aten flash attention (CPU)"
    assert not PLANNED.has(node_of("attention", (q, q, q, None), attrs | {"implementation": "eager", "cap": 2.0}))


def test_aten_keeps_what_it_does_faster(monkeypatch):
    """The forward pass of long rows in bfloat16, where there is AMX."""
    labels = []
    for there in (False, True):
        monkeypatch.setattr(amx, "available", lambda there=there: there)
        for dtype in DTYPES:
            q = torch.zeros(1, 1, attention.LONG, 8, dtype=dtype)
            node = node_of("attention", (q, q, q, None), {"causal": True, "scale": 0.2, **ATTRS})
            labels.append(PLANNED.lower(node).label)
    assert labels == [attention.NATIVE] * 3 + [attention.LABEL]
