"""qk_norm_rope, rope and their gradients over generated shapes, layouts and dtypes, against float64 autograd of the
plain formula; and kernels with one mistake each, which these checks find."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton import rope as rules
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import rope as kernels
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned.immediate import immediate, node_of
from tests.backends.cuda_triton.mutate import fails, mutated
from tests.backends.cuda_triton.run_graph import forward_and_gradients
from tests.tolerances import assert_close

EPS = 1e-5
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`heads` of q and of k; `dim` of `width` are turned. `layout`: dense, a view of a projection, or one of a stacked
    projection. `wide`: float32 tables beside another dtype."""

    batch: int = 2
    heads: tuple[int, int] = (4, 2)
    tokens: int = 9
    dim: int = 16
    width: int = 16
    dtype: str = "f32"
    layout: str = "dense"
    norm: bool = True
    cast: str = "before"
    offset: float = 0.0
    interleaved: bool = False
    shared: bool = True
    wide: bool = False

    def __str__(self) -> str:
        size = f"{self.batch}x{self.heads[0]}/{self.heads[1]}x{self.tokens}x{self.dim}of{self.width}"
        marks = ("pairs" * self.interleaved, f"norm {self.cast} +{self.offset}" * self.norm, "wide" * self.wide)
        return " ".join(mark for mark in (self.dtype, size, self.layout, *marks) if mark)

    @property
    def attrs(self) -> dict:
        turn = {"interleaved": self.interleaved, "upcast": "terms" if self.wide else ""}
        return {"eps": EPS, "weight_cast": self.cast, "offset": self.offset, **turn}


def generated() -> list[Case]:
    """56 cases of a seed, in combinations that nobody chose: each GQA ratio, a part of a head, one token, many."""
    draw = random.Random(11)
    made = []
    for number in range(56):
        width = draw.choice((2, 10, 16, 64, 80, 96, 128, 256))
        cast, offset = draw.choice((("before", 0.0), ("after", 0.0), ("after", 1.0)))
        dtype = draw.choice(("f32", "bf16", "bf16", "f16"))
        made.append(
            Case(
                batch=draw.choice((1, 2, 3)),
                heads=draw.choice(((1, 1), (2, 2), (4, 1), (4, 2), (6, 2), (9, 3), (5, 1))),
                tokens=draw.choice((1, 2, 7, 16, 33, 70)),
                dim=draw.choice((width, width, max(width // 8 * 2, 2))),
                width=width,
                dtype=dtype,
                layout=draw.choice(("dense", "projected", "stacked")),
                norm=number % 4 != 0,
                cast=cast,
                offset=offset,
                interleaved=draw.random() < 0.4,
                shared=draw.random() < 0.5,
                wide=dtype != "f32" and draw.random() < 0.3,
            )
        )
    return made


def laid_out(rand, case: Case, heads: int, scale: float = 1.0) -> Tensor:
    dtype = DTYPES[case.dtype]
    if case.layout == "dense":
        return rand(case.batch, heads, case.tokens, case.width, dtype=dtype, scale=scale)
    beside = 0 if case.layout == "projected" else 3
    stacked = rand(case.batch, case.tokens, heads + beside, case.width, dtype=dtype, scale=scale)
    return stacked[:, :, beside:].transpose(1, 2)


def tables(case: Case, device: torch.device) -> list[Tensor]:
    """cos, sin [B or 1, 1, T, D]: equal at both places of a frequency, as every model has them."""
    batch = 1 if case.shared else case.batch
    position = torch.arange(case.tokens)[None, :] + 13 * torch.arange(batch)[:, None]
    angle = position[..., None] * 10000.0 ** (-torch.arange(0, case.dim, 2) / case.dim)
    angle = angle.repeat_interleave(2, dim=-1) if case.interleaved else torch.cat([angle, angle], dim=-1)
    dtype = torch.float32 if case.wide else DTYPES[case.dtype]
    return [table.to(dtype).to(device)[:, None] for table in (angle.cos(), angle.sin())]


def rotate_half(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def plain(case: Case, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' norm of a head and rotation, in x's dtype; float64 has no roundings."""
    if weight is not None:
        wide = x if x.dtype == torch.float64 else x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        gained = normal * (case.offset + weight.to(wide.dtype))
        x = weight * normal.to(x.dtype) if case.cast == "before" else gained.to(x.dtype)
    turned, rest = x[..., : case.dim], x[..., case.dim :]
    y = turned * cos + rotate_half(turned, case.interleaved) * sin
    return torch.cat([y.to(x.dtype), rest], dim=-1)


def plain_results(case: Case, ins: list[Tensor], dys: list[Tensor], turn: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in ins]
    weights = leaves[2:] or [None, None]
    outs = [plain(case, x, weight, *turn) for x, weight in zip(leaves[:2], weights, strict=True)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, dys)]


def check(case: Case, rand) -> None:
    ins = [laid_out(rand, case, heads, 2.0) for heads in case.heads]
    dys = [laid_out(rand, case, heads) for heads in case.heads]
    if case.norm:
        ins += [rand(case.width, dtype=DTYPES[case.dtype]) for _ in range(2)]
    turn = tables(case, ins[0].device)
    given = [*ins, *([] if case.norm else [None, None]), *turn]
    outs, grads, ran = forward_and_gradients("qk_norm_rope", given, dys, range(len(ins)), **case.attrs)
    assert ran == ["qk_norm_rope", "qk_norm_rope_bwd"]
    wide = [[tensor.double() for tensor in tensors] for tensors in (ins, dys, turn)]
    reference, plains = plain_results(case, *wide), plain_results(case, ins, dys, turn)
    for number, (name, value, true, other) in enumerate(
        zip(("q", "k", "dq", "dk", "dq_weight", "dk_weight"), (*outs, *grads), reference, plains, strict=False)
    ):
        largest = float(true.abs().max())
        if case.norm and name in ("dq", "dk"):
            # A difference of terms of the size of rstd * g: roundings are relative to them.
            x, weight = wide[0][number - 2], wide[0][number]
            rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
            turned = wide[1][number - 2].abs() * 2**0.5
            largest = max(largest, float((rstd * turned * (case.offset + weight).abs().max()).max()))
        assert value.dtype == DTYPES[case.dtype]
        assert_close(name, value, true, other, scale=largest)


@pytest.mark.parametrize("case", generated(), ids=str)
def test_within_the_derived_bound(rand, case):
    check(case, rand)


@pytest.mark.parametrize("case", [case for case in generated() if not case.norm or case.tokens < 40], ids=str)
def test_one_projection_is_turned_alike_alone(rand, same, case):
    """`rope` and `rope_bwd` are the same kernel over q alone."""
    case = replace(case, norm=False)
    q, k = (laid_out(rand, case, heads) for heads in case.heads)
    turn = tables(case, q.device)
    attrs = {"interleaved": case.interleaved, "upcast": case.attrs["upcast"]}
    both = apply("qk_norm_rope", q, k, None, None, *turn, **case.attrs)
    needs = (True, True, False, False)
    back = apply("qk_norm_rope_bwd", q, k, None, None, None, None, *turn, needs=needs, **case.attrs)
    for x, y, dx in zip((q, k), both, back, strict=True):
        same(apply("rope", x, *turn, **attrs), y)
        same(apply("rope_bwd", x, *turn, **attrs), dx)


NORMED = Case(dim=8, width=12, cast="after", offset=1.0, heads=(3, 2), tokens=70)
BARE = replace(NORMED, norm=False)
MUTATIONS = {
    "the rotation transposed": (BARE, {"y1 = x1 * cos1 - x2 * sin1": "y1 = x1 * cos1 + x2 * sin1"}),
    "the gradient not transposed": (BARE, {"x1 * cos1 + x2 * sin2": "x1 * cos1 - x2 * sin2"}),
    "the wrong half": (BARE, {"tl.load(at + HALF + col": "tl.load(at + col"}),
    "the rest not copied": (BARE, {"y3 = narrow(x3,": "y3 = narrow(x3 * 0.0,"}),
    "the last token skipped": (BARE, {"present = token < tokens": "present = token < tokens - 1"}),
    "the last head skipped": (BARE, {"in range(heads)": "in range(heads - 1)"}),
    "pairs taken for halves": (replace(BARE, interleaved=True), {"    if INTERLEAVED:": "    if not INTERLEAVED:"}),
    "the offset dropped": (NORMED, {"gain1 + offset": "gain1"}),
    "the rest not normed": (NORMED, {"x3 = x3 * rstd * gain3": "x3 = x3"}),
    "the rest not in the mean": (NORMED, {"square += tl.sum(x3 * x3, axis=1)": "square += 0.0"}),
    "the mean term left out": (NORMED, {"h1 - n1 * tilt": "h1"}),
    "backward without the rotation": (NORMED, {"y1 * cos1 + y2 * sin2": "y1"}),
    "the rest not in the tilt": (NORMED, {"tilt += tl.sum(h3 * n3, axis=1)": "tilt += 0.0"}),
    "a weight's gradient of one head": (NORMED, {"dw1 += g1 * n1": "dw1 = g1 * n1"}),
    "partial sums of groups collide": (NORMED, {"tl.program_id(1) * tl.num_programs(0)": "0 * tl.num_programs(0)"}),
}


@pytest.mark.parametrize("case", [BARE, replace(BARE, interleaved=True), NORMED], ids=str)
def test_the_kernels_themselves_pass(rand, monkeypatch, case):
    monkeypatch.setattr(common, "MAX_ROPE_PROGRAMS", 4)
    check(case, rand)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_fails(rand, monkeypatch, tmp_path, name):
    case, edits = MUTATIONS[name]
    monkeypatch.setattr(common, "MAX_ROPE_PROGRAMS", 4)  # programs of several heads and tiles
    monkeypatch.setattr(rules, "kernels", mutated(kernels, edits, tmp_path))
    assert fails(lambda: check(case, rand))


@pytest.mark.parametrize("programs", [1, 7, 1024])
def test_heads_and_tokens_are_shared_out_whatever_the_programs(rand, monkeypatch, programs):
    """All heads in one program, groups with one head over, and a program for each head."""
    monkeypatch.setattr(common, "MAX_ROPE_PROGRAMS", programs)
    check(replace(NORMED, heads=(5, 3)), rand)
    check(replace(BARE, heads=(5, 3)), rand)


@pytest.mark.parametrize("norm", [False, True])
def test_results_may_take_their_inputs_places(rand, same, norm):
    case = replace(NORMED, norm=norm, layout="stacked")
    q, k = (laid_out(rand, case, heads) for heads in case.heads)
    weights = [rand(case.width), rand(case.width)] if norm else [None, None]
    turn = tables(case, q.device)
    expected = apply("qk_norm_rope", q, k, *weights, *turn, **case.attrs)
    raw = [x.clone() for x in (q, k)] if norm else [None, None]
    bind("qk_norm_rope", (q, k, *weights, *turn), (q, k), **case.attrs)
    same(q, expected[0])
    same(k, expected[1])
    needs = (True, True, norm, norm)
    back = apply("qk_norm_rope_bwd", q, k, *raw, *weights, *turn, needs=needs, **case.attrs)
    sums = [torch.empty_like(weight) for weight in weights if weight is not None]
    bind("qk_norm_rope_bwd", (q, k, *raw, *weights, *turn), (q, k, *sums), needs=needs, **case.attrs)
    for value, other in zip((q, k, *sums), back, strict=True):
        same(value, other)


NEEDS = [(True, True, False, False), (False, False, True, True), (True, False, False, True), (False, True, True, True)]


@pytest.mark.parametrize("needs", NEEDS)
def test_each_gradient_alone_has_the_bits_of_all_together(rand, same, needs):
    case = NORMED
    dq, dk, q, k = (laid_out(rand, case, heads) for heads in (*case.heads, *case.heads))
    ins = (dq, dk, q, k, rand(case.width), rand(case.width), *tables(case, q.device))
    whole = apply("qk_norm_rope_bwd", *ins, needs=(True,) * 4, **case.attrs)
    part = apply("qk_norm_rope_bwd", *ins, needs=needs, **case.attrs)
    for value, other in zip(part, (each for each, need in zip(whole, needs, strict=True) if need), strict=True):
        same(value, other)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("unread", [0, 1])
def test_nothing_flows_into_what_nothing_reads(rand, same, unread, norm):
    case = replace(NORMED, norm=norm)
    ins = [laid_out(rand, case, heads) for heads in case.heads]
    weights = [rand(case.width), rand(case.width)] if norm else [None, None]
    given = [*ins, *weights, *tables(case, ins[0].device)]
    dys: list[Tensor | None] = [laid_out(rand, case, heads) for heads in case.heads]
    place = 1 - unread
    wrt = (place, 2 + place) if norm else (place,)
    _, both, _ = forward_and_gradients("qk_norm_rope", given, dys, wrt, **case.attrs)
    dys[unread] = None
    _, alone, _ = forward_and_gradients("qk_norm_rope", given, dys, wrt, **case.attrs)
    for value, other in zip(alone, both, strict=True):
        same(value, other)


def test_no_tokens(rand):
    case = replace(NORMED, tokens=0)
    q, k = (laid_out(rand, case, heads) for heads in case.heads)
    ins = (q, k, q, k, rand(case.width), rand(case.width), *tables(case, q.device))
    dq, dk, *sums = apply("qk_norm_rope_bwd", *ins, needs=(True,) * 4, **case.attrs)
    assert (dq.shape, dk.shape) == (q.shape, k.shape)
    assert all(torch.equal(each, torch.zeros_like(each)) for each in sums)


def test_a_backward_pass_is_two_launches(rand):
    """Both projections, then both weights' sums; without norms or their gradients one."""
    q, k = rand(2, 4, 5, 16), rand(2, 2, 5, 16)
    turn, weight = tables(Case(tokens=5), q.device), rand(16)
    for raw, needs, expected in (
        ((q, k, weight, weight), (True,) * 4, ["qk_norm_rope_bwd", "column_sums"]),
        ((q, k, weight, weight), (True, True, False, False), ["qk_norm_rope_bwd"]),
        ((None,) * 4, (True, True, False, False), ["rope"]),
    ):
        outs = tuple(torch.empty_like(x) for x, need in zip((q, k, weight, weight), needs, strict=True) if need)
        calls = launches("qk_norm_rope_bwd", (q, k, *raw, *turn), outs, needs=needs, **Case().attrs)
        assert [call.name for call in calls] == expected


def launches(op: str, ins: tuple, outs: tuple, **attrs) -> list:
    run = immediate(outs[0].device)
    RULES.lower(node_of(op, ins, attrs)).bind(run, ins, outs, **attrs)
    return run.calls


def bind(op: str, ins: tuple, outs: tuple, **attrs) -> None:
    for call in launches(op, ins, outs, **attrs):
        call()
