"""flash_attention and all its gradients on Triton against float64 torch and torch.autograd, over generated cases."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton import attention as rules
from smedjan.backends.cuda_triton import tuned
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import attention as kernels
from smedjan.backends.cuda_triton.kernels import attention_bwd
from smedjan.backends.planned.immediate import immediate, node_of
from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.errors import BackendError
from smedjan.graph.node import Graph
from smedjan.graph.op import OPS
from smedjan.graph.program import Program
from smedjan.graph.rewrite import decompose
from tests.backends.cuda_triton.mutate import fails, mutated
from tests.tolerances import UNIT_ROUNDOFF, assert_close

SHORT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """heads are (query heads, key heads); `pad` is where the key mask hides keys; `documents` are lengths in a row."""

    batch: int = 1
    heads: tuple[int, int] = (2, 1)
    queries: int = 33
    keys: int = 0
    dim: int = 16
    causal: bool = True
    window: int = 0
    cap: float = 0.0
    sinks: bool = False
    pad: str = ""
    documents: tuple[int, ...] = ()
    dtype: str = "float32"
    spread: float = 1.0

    def __str__(self) -> str:
        size = f"{self.batch}x{self.heads[0]}/{self.heads[1]}x{self.queries}x{self.keys or self.queries}x{self.dim}"
        marks = [self.dtype.replace("float", "f").replace("bf", "bf"), size]
        marks += [
            "" if self.causal else "full",
            f"w{self.window}" * bool(self.window),
            f"cap{self.cap}" * bool(self.cap),
        ]
        marks += ["sinks" * self.sinks, self.pad, f"{len(self.documents)}docs" * bool(self.documents)]
        return " ".join(mark for mark in marks if mark)


def generated() -> list[Case]:
    """48 cases of a seed: every head dim, GQA ratio, mask and dtype, in combinations that nobody chose."""
    draw = random.Random(5)
    made = []
    for number in range(48):
        queries = draw.choice((1, 2, 7, 16, 31, 33, 48))
        heads = draw.choice(((1, 1), (2, 2), (2, 1), (4, 2), (3, 1), (2, 1)))
        causal = draw.random() < 0.8
        documents: tuple[int, ...] = ()
        if draw.random() < 0.35:
            left = queries
            while left:
                documents += (draw.choice((1, 1, min(left, 5), min(left, 17), left)),)
                left -= documents[-1]
        keys = 0 if documents else max(queries + draw.choice((0, 0, 0, 5, 37, -3)), 1)
        made.append(
            Case(
                batch=draw.choice((1, 1, 1, 2)),
                heads=heads,
                queries=queries,
                keys=keys,
                dim=(8, 10, 16, 64, 80, 96, 128, 256)[number % 8],
                causal=causal,
                window=draw.choice((0, 0, 1, 5, 16, 40)) if causal else 0,
                cap=draw.choice((0.0, 0.0, 2.0, 30.0)),
                sinks=draw.random() < 0.3,
                pad=draw.choice(("", "", "", "left", "right", "holes")),
                documents=documents,
                dtype=draw.choice(("float32", "bfloat16", "bfloat16", "float16")),
                spread=draw.choice((1.0, 3.0)),
            )
        )
    return made


CASES = [
    *generated(),
    Case(queries=1),
    Case(queries=1, keys=77, dim=64, heads=(8, 2), dtype="bfloat16"),
    Case(queries=60, documents=(1,) * 60),
    Case(queries=70, documents=(16, 1, 31, 16, 6), dim=64, window=9, sinks=True, dtype="bfloat16"),
    Case(queries=70, documents=(30, 40), causal=False),
    Case(queries=20, keys=7, sinks=True),
    Case(queries=64, keys=64, dim=64, dtype="bfloat16"),
    Case(queries=96, window=96),
    Case(queries=96, window=33, pad="left"),
    Case(heads=(8, 1), queries=40, cap=5.0, sinks=True, dtype="bfloat16"),
]


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    start: Tensor | None
    end: Tensor | None
    sinks: Tensor | None
    dy: Tensor

    @property
    def masks(self) -> tuple[Tensor | None, ...]:
        return self.key_mask, self.start, self.end

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(() if self.sinks is None else (self.sinks,))]


def attrs(case: Case) -> dict:
    return {"scale": case.dim**-0.5, "causal": case.causal, "window": case.window, "cap": case.cap}


def inputs(case: Case, rand: Callable[..., Tensor]) -> Inputs:
    """q, k and v are views into one stacked projection where they have as many tokens; dy has y's layout."""
    dtype = SHORT[case.dtype]
    (query_heads, key_heads), keys = case.heads, case.keys or case.queries
    if keys == case.queries:
        stacked = rand(case.batch, keys, query_heads + 2 * key_heads, case.dim, dtype=dtype).transpose(1, 2)
        q, k, v = stacked.split([query_heads, key_heads, key_heads], dim=1)
        q.mul_(case.spread)
    else:
        q = rand(case.batch, query_heads, case.queries, case.dim, dtype=dtype, scale=case.spread)
        k, v = (rand(case.batch, key_heads, keys, case.dim, dtype=dtype) for _ in range(2))
    dy = rand(case.batch, case.queries, query_heads, case.dim, dtype=dtype).transpose(1, 2)
    key_mask = start = end = None
    if case.pad:
        place = torch.arange(keys, device=q.device)
        shown = {"left": place >= keys // 3, "right": place < keys - keys // 3, "holes": place % 3 != 1}[case.pad]
        key_mask = shown.repeat(case.batch, 1)
        key_mask[-1] = True
        if case.batch > 1:
            key_mask[0] &= place != 0
    if case.documents:
        ids = torch.repeat_interleave(torch.arange(len(case.documents)), torch.tensor(case.documents))
        start, end = apply("document_bounds", ids.repeat(case.batch, 1).to(q.device))
    return Inputs(q, k, v, key_mask, start, end, rand(query_heads) if case.sinks else None, dy)


def logits(q: Tensor, k: Tensor, case: Case) -> Tensor:
    """Capped scores, in float32 at least."""
    scores = (q @ k.transpose(-1, -2) * case.dim**-0.5).to(torch.promote_types(q.dtype, torch.float32))
    return case.cap * torch.tanh(scores / case.cap) if case.cap else scores


def visible(case: Case, masks: tuple[Tensor | None, ...], queries: int, keys: int, device: torch.device) -> Tensor:
    """[B or 1, 1, T, S]: what the op's docstring says, condition by condition."""
    key_mask, start, end = masks
    place = torch.arange(queries, device=device)[:, None] + keys - queries
    key = torch.arange(keys, device=device)
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if case.causal:
        seen = seen & (key <= place)
    if case.window:
        seen = seen & (key > place - case.window)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    if start is not None and end is not None:
        seen = seen & (key >= start[:, None, :, None]) & (key < end[:, None, :, None])
    return seen


def plain(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, case: Case, masks: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """The formula in torch, in q's dtype with the softmax in float32 (float64 of float64): y and lse."""
    keys = k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    terms = logits(q, k, case).masked_fill(~visible(case, masks, q.shape[2], keys, q.device), float("-inf"))
    if sinks is not None:
        terms = torch.cat([terms, sinks.to(terms.dtype)[None, :, None, None].expand(*terms.shape[:3], 1)], -1)
    peak = terms.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    terms = torch.exp(terms - peak)
    total = terms.sum(-1, keepdim=True)
    weights = terms[..., :keys] / total.where(total > 0, 1.0)
    return weights.to(v.dtype) @ v, (total.log() + peak)[..., 0]


def oracle(given: Inputs, case: Case, *, wide: bool) -> tuple[Tensor, ...]:
    """y, lse, dq, dk, dv and dsinks where there are sinks, by autograd; in float64 where `wide`."""
    leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in given.leaves]
    y, lse = plain(*leaves[:3], leaves[3] if case.sinks else None, case, given.masks)
    return (y.detach(), lse.detach(), *torch.autograd.grad(y, leaves, given.dy.to(y.dtype)))


def fused(given: Inputs, case: Case) -> tuple[Tensor, ...]:
    ins = (given.q, given.k, given.v, *given.masks, given.sinks)
    y, lse = apply("flash_attention", *ins, **attrs(case))
    made = apply("flash_attention_bwd", given.dy, *ins, y, lse, needs_sinks=case.sinks, **attrs(case))
    return (y, lse, *made)


NAMES = ("y", "lse", "dq", "dk", "dv", "dsinks")


def scales(given: Inputs, case: Case, true: tuple[Tensor, ...]) -> dict[str, float]:
    """For the bounds of tests/tolerances.py: what each gradient's roundings are relative to, where terms cancel.

    The plain computation normalises p by its own sum and takes dp - t from one array, so that an only key's gradient is
    exactly 0. Every attention that stores no p has, beside u max|reference|,

    - in t = sum(dy y) the roundings e of y, independent, u |y| at most: together u |dy y|, Euclidean. They move dq by
      e (p k), dk by e p q and dsink by e exp(sink - lse), all three again independent from row to row;
    - in p = exp(s - lse) the rounding of lse and of its product with log2(e), 2 u32 |lse|, and those of two float32
      sums in dp - t, u32 (sum |dy v| + sum |dy y|).
    """
    y, lse = true[:2]
    group = case.heads[0] // case.heads[1]
    q, k, v, dy = (x.double() for x in (given.q, given.k, given.v, given.dy))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    seen = visible(case, given.masks, q.shape[2], k.shape[2], q.device)
    p = torch.exp(logits(q, k, case) - lse[..., None]).where(seen, 0.0)

    def of_group(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    rounded = (dy * y).norm(dim=-1, keepdim=True)
    several = 1 + 2 * lse.nan_to_num(neginf=0.0).abs()[..., None]
    sums = p * several * (dy.abs() @ v.abs().transpose(-1, -2) + (dy * y).abs().sum(-1, keepdim=True))
    factor = case.dim**-0.5
    found = {
        "dq": (factor * rounded * (p @ k).abs(), factor * sums @ k.abs()),
        "dk": (
            factor * of_group((p * rounded).square().transpose(-1, -2) @ q.square()).sqrt(),
            factor * of_group(sums.transpose(-1, -2) @ q.abs()),
        ),
        "dv": (torch.zeros(1), of_group((p * several).transpose(-1, -2) @ dy.abs())),
    }
    if given.sinks is not None:
        rest = torch.exp(given.sinks.double()[None, :, None] - lse)[..., None]
        cancelled = (dy * y).abs().sum(-1, keepdim=True)
        found["dsinks"] = ((rest * rounded).square().sum((0, 2)).sqrt(), (rest * several * cancelled).sum((0, 2)))
    wide, own = UNIT_ROUNDOFF[torch.float32], UNIT_ROUNDOFF[given.q.dtype]
    made = {}
    for name, reference in zip(NAMES[2:], true[2:], strict=False):
        rounding, cancelling = (float(x.max()) for x in found[name])
        # dsinks is float32, whatever y is rounded to.
        unit = wide if name == "dsinks" else own
        made[name] = max(float(reference.abs().max()), rounding * own / unit) + cancelling * wide / unit
    return made


def check(case: Case, rand: Callable[..., Tensor]) -> None:
    given = inputs(case, rand)
    got, true, ours = fused(given, case), oracle(given, case, wide=True), oracle(given, case, wide=False)
    relative = scales(given, case, true)
    for name, value, reference, torchs in zip(NAMES, got, true, ours, strict=False):
        if name == "lse":
            nothing = reference.isneginf()
            assert bool((value[nothing] == float("inf")).all()), "a row that sees nothing"
            value, reference, torchs = (x.masked_fill(nothing, 0.0) for x in (value, reference, torchs))
        assert_close(name, value, reference, torchs, scale=relative.get(name))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 x 16: a test's few tokens are many of them."""

    def options(kernel: str, shape_class: str, **_: object) -> dict:
        rows, keys = (16, 32) if kernel == "attention_bwd_kv" else (32, 16)
        return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": 4, "num_stages": 2}

    if rules.common.INTERPRETED.value:
        monkeypatch.setattr(tuned, "options", options)
        monkeypatch.setattr(tuned, "has", lambda *_: True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_are_within_the_derived_bound(rand, case):
    check(case, rand)


def test_the_shipped_tiles(rand):
    """The launch shapes of tuned.json, on more than one tile of them."""
    check(Case(queries=150, dim=64, heads=(2, 1), dtype="bfloat16", documents=(70, 80)), rand)
    check(Case(queries=40, dim=128, heads=(1, 1), sinks=True), rand)
    check(Case(queries=140, dim=256, heads=(2, 1), dtype="float16"), rand)


def test_results_may_lie_in_a_wider_buffer(rand, same):
    """y as [B, T, A, D]; dq, dk and dv side by side in one [B, T, (A + 2 K) D], a stacked projection's gradient."""
    case = Case(batch=2, queries=19, heads=(4, 2), dim=16)
    given = inputs(case, rand)
    ins = (given.q, given.k, given.v, None, None, None, None)
    y, lse = apply("flash_attention", *ins, **attrs(case))
    apart = apply("flash_attention_bwd", given.dy, *ins, y, lse, **attrs(case))
    run = immediate(given.q.device)
    inside = torch.full((2, 19, 4, 16), float("nan"), device=y.device).transpose(1, 2)
    rules.flash_attention(run, ins, (inside, lse.clone()), **attrs(case))
    stacked = torch.full((2, 19, 8, 16), float("nan"), device=y.device).transpose(1, 2)
    dq, dk, dv = stacked.split([4, 2, 2], dim=1)
    full = (given.dy, *ins, y, lse)
    rules.flash_attention_bwd(run, full, (dq, dk, dv), needs_sinks=False, **attrs(case))
    for call in run.calls:
        call()
    same(inside, y)
    for part, whole in zip((dq, dk, dv), apart, strict=True):
        same(part, whole)


def test_what_nobody_reads_is_not_computed(rand, same):
    case = Case(queries=17, sinks=True)
    given = inputs(case, rand)
    ins = (given.q, given.k, given.v, None, None, None, given.sinks)
    y, lse = apply("flash_attention", *ins, **attrs(case))
    dq, dk, dv, dsinks = apply("flash_attention_bwd", given.dy, *ins, y, lse, needs_sinks=True, **attrs(case))
    for wanted in ((0,), (1,), (2,), (0, 1, 2), (3,)):
        outs = tuple(
            torch.full_like(x, float("nan")) if n in wanted else None for n, x in enumerate((dq, dk, dv, dsinks))
        )
        run = immediate(given.q.device)
        full = (given.dy, *ins, y, lse)
        rules.flash_attention_bwd(run, full, outs, needs_sinks=True, **attrs(case))
        names = [call.name for call in run.calls]
        assert ("attention_bwd_q" in names) == (0 in wanted)
        assert ("attention_bwd_kv" in names) == bool({1, 2} & set(wanted))
        for call in run.calls:
            call()
        for out, value in zip(outs, (dq, dk, dv, dsinks), strict=True):
            if out is not None:
                same(out, value)


def test_no_queries(rand):
    y, lse = apply("flash_attention", rand(0, 2, 3, 8), rand(0, 1, 3, 8), rand(0, 1, 3, 8), scale=1.0)
    assert y.shape == (0, 2, 3, 8)
    assert lse.shape == (0, 2, 3)


@pytest.mark.parametrize("lengths", [(1,), (5,), (1, 1, 1), (64, 64), (63, 1, 65), (130,), (1,) * 130, (100, 1, 29, 3)])
def test_document_bounds(device, lengths):
    number = torch.repeat_interleave(torch.arange(len(lengths)) % 3, torch.tensor(lengths)).to(device)
    ids = torch.stack([number, torch.zeros_like(number)])
    start, end = apply("document_bounds", ids)
    other = ATEN.lower(node_of("document_bounds", (ids,), {})).run(ids)
    assert start.dtype == end.dtype == torch.int32
    assert torch.equal(start, other[0])
    assert torch.equal(end, other[1])
    ends = torch.tensor(lengths).cumsum(0)
    assert torch.equal(end[0].cpu().long(), torch.repeat_interleave(ends, torch.tensor(lengths)))
    assert torch.equal(
        start[0].cpu().long(), torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths))
    )


def decomposed(name: str, ins: tuple, **attributes: object) -> tuple[Tensor, ...]:
    """The op by its decomposition, on torch_reference."""
    graph = Graph()
    arrays = {f"{n}": x for n, x in enumerate(ins) if x is not None}
    given = [
        None if x is None else graph.input(f"{n}", tuple(x.shape), str(x.dtype).removeprefix("torch."))
        for n, x in enumerate(ins)
    ]
    made = OPS[name](*given, **attributes)
    for index, tensor in enumerate(made if isinstance(made, tuple) else (made,)):
        graph.output(f"{index}", tensor)
    return tuple(Program(decompose(graph, ATEN.has), ATEN)(arrays).values())


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=9, keys=14, window=4, sinks=True, pad="left"),
        Case(queries=9, documents=(4, 5), cap=2.0, heads=(4, 2)),
        Case(queries=6, keys=4, causal=False),
    ],
    ids=str,
)
def test_the_decomposition_is_the_formula(rand, case):
    """The ops that define it, and the VJP of those, against float64 autograd of the plain formula."""
    given = inputs(case, rand)
    ins = (given.q, given.k, given.v, *given.masks, given.sinks)
    (y,) = decomposed("flash_attention", ins, **attrs(case))
    nothing = (torch.empty_like(y), torch.empty(y.shape[:3], device=y.device))
    made = decomposed("flash_attention_bwd", (given.dy, *ins, *nothing), needs_sinks=case.sinks, **attrs(case))
    true = oracle(given, case, wide=True)
    for value, reference in zip((y, *made), (true[0], *true[2:]), strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_launch_shape_is_there(capability):
    for dim in rules.HEAD_DIMS:
        for name in tuned.NAMES.values():
            both = tuned.has("attention_bwd_kv", f"{dim} {name}", capability=capability)
            apart = ("attention_bwd_kv",) if both else ("attention_bwd_k", "attention_bwd_v")
            for kernel in ("attention_fwd", "attention_bwd_q", "attention_decode", *apart):
                found = tuned.options(kernel, f"{dim} {name}", capability=capability)
                assert {"BLOCK_N", "num_warps", "num_stages", "enable_fp_fusion"} <= found.keys()


def test_an_architecture_without_a_table_takes_the_one_below():
    assert tuned.options("attention_fwd", "128 bf16", capability=89) == tuned.options(
        "attention_fwd", "128 bf16", capability=80
    )
    with tuned.architecture(120):
        assert tuned.options("attention_fwd", "128 f32") == tuned.options("attention_fwd", "128 f32", capability=120)
    with pytest.raises(BackendError, match="sm_75"):
        tuned.options("attention_fwd", "128 bf16", capability=75)
    with pytest.raises(BackendError, match="'512 bf16'"):
        tuned.options("attention_fwd", "512 bf16")


@pytest.mark.parametrize(
    ("dim", "held"),
    [(8, (16, 0)), (16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0)),
     (128, (128, 0)), (160, (128, 32)), (192, (128, 64)), (256, (256, 0))],
)  # fmt: skip
def test_columns_hold_the_head_dim(dim, held):
    assert rules.columns(dim) == held


MUTATIONS = {
    "no max subtraction": (kernels, {"peak = tl.maximum(m, tl.max(s, axis=1) * factor)": "peak = m * 0.0"}),
    "a skipped tile": (kernels, {"begin = first if MASKED else whole": "begin = first if MASKED else whole + 1"}),
    "a skipped ragged end": (kernels, {"stop = last - (ragged": "stop = last - 1 - (ragged"}),
    "an ignored window": (kernels, {"place - (WINDOW - 1)": "place - 2 * WINDOW"}),
    "a window one too wide": (kernels, {"place - (WINDOW - 1)": "place - WINDOW"}),
    "the wrong key head": (kernels, {"head // GROUP": "head % (tl.num_programs(1) // GROUP)"}),
    "a dropped sink": (kernels, {"total += 1.0": "total += 0.0"}),
    "documents that see each other": (kernels, {"low = tl.maximum(low, tl.load(start + row))": "low = low"}),
    "sums that are not rescaled": (kernels, {"acc * rescale[:, None])": "acc)"}),
    "no lse in dk and dv": (attention_bwd, {"- (z * LOG2_E)[None, :]": ""}),
    "no lse in dq": (attention_bwd, {"factor - z[:, None]": "factor"}),
    "no t": (attention_bwd, {"dp - inner_sum[None, :]": "dp"}),
    "one query head of a group": (attention_bwd, {"member = step // count": "member = 0"}),
    "keys of another document": (attention_bwd, {"high = tl.minimum(high, tl.load(end + key))": "high = high"}),
    "a window of another length": (attention_bwd, {"place + WINDOW)": "place + WINDOW + 1)"}),
    "a skipped tile of dq": (attention_bwd, {"        stop = last - (ragged": "        stop = last - 1 - (ragged"}),
    "no scale": (attention_bwd, {"dq_main * scale": "dq_main"}),
    "a cap without its slope": (attention_bwd, {"ds * (1.0 - s * s)": "ds"}),
}  # fmt: skip


MUTATED = Case(queries=50, heads=(4, 2), window=40, documents=(47, 3), sinks=True, dtype="float16")


def altered(name: str) -> Case:
    """What makes the mutation matter."""
    if name == "a skipped tile":  # one that is not masked
        return replace(MUTATED, window=0, documents=())
    return replace(MUTATED, spread=200.0 if "max" in name else 1.0, cap=2.0 if "cap" in name else 0.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["no max subtraction", "a skipped tile", "a cap without its slope", "all others"])
def test_the_kernel_is_right_where_wrong_ones_are_told(rand, name):
    check(altered(name), rand)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_is_found(rand, monkeypatch, tmp_path, name):
    module, edits = MUTATIONS[name]
    monkeypatch.setattr(rules, "kernels" if module is kernels else "backward", mutated(module, edits, tmp_path))
    assert fails(lambda: check(altered(name), rand)), name
