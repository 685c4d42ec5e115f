"""Every norm over 40 generated shapes, layouts and dtypes, alone and behind a residual sum: results and all gradients
against float64 autograd of the plain formula; and kernels with one mistake each, which these checks find."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from smedjan.backends.cuda_triton import norm as rules
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import layer_norm as layer_kernels
from smedjan.backends.cuda_triton.kernels import norm as kernels
from smedjan.backends.cuda_triton.rules import RULES
from smedjan.backends.planned.immediate import immediate, node_of
from tests.backends.cuda_triton.mutate import fails, mutated
from tests.backends.cuda_triton.run_graph import forward_and_gradients
from tests.tolerances import assert_close

EPS = 1e-5
OPS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`layout`: dense, a third of a stacked projection, or heads that were moved to the front. `cast` is a layer norm's
    bias too: "after" has one."""

    op: str
    shape: tuple[int, ...]
    layout: str = "dense"
    dtype: str = "f32"
    cast: str = "before"
    offset: float = 0.0
    factor: float = 1.0

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.op} {self.dtype} {size} {self.layout} {self.cast} +{self.offset} x{self.factor}"

    @property
    def adds(self) -> bool:
        return self.op.startswith("add_")

    @property
    def centred(self) -> bool:
        return self.op.endswith("layer_norm")

    @property
    def attrs(self) -> dict:
        own = {"composed": False} if self.centred else {"weight_cast": self.cast, "offset": self.offset}
        return {"eps": EPS, **own, **({"factor": self.factor} if self.adds else {})}


CORNERS = [(1, 5), (1, 8191), (3, 8193), (33, 64), (130, 7), (2, 1, 1, 128), (1, 3, 1, 64)]
"""One row, rows that one kernel does not hold with its sums, more rows than a tile, heads of one token."""


def cases(op: str) -> list[Case]:
    """40 of a seed for each op: shapes, layouts, dtypes and attributes that nobody chose, after the corners."""
    draw = random.Random(op)
    made = []
    for number in range(40):
        width = draw.choice((5, 16, 33, 64, 96, 127, 128, 200, 576, 768, 1000, 1536))
        most = max(4096 // width, 1)  # few programs: the interpreter runs them one after the other
        leading = draw.choice(
            (
                (draw.randint(1, min(most, 40)),),
                (2, draw.randint(1, min(most, 9))),
                (2, 3, draw.randint(1, min(most, 7))),
            )
        )
        shape = CORNERS[number] if number < len(CORNERS) else (*leading, width)
        cast, offset = draw.choice((("before", 0.0), ("after", 0.0), ("after", 1.0)))
        layouts = ("dense", "sliced", "heads", "mixed") if len(shape) == 4 else ("dense", "sliced")
        made.append(
            Case(
                op=op,
                shape=shape,
                layout=draw.choice(layouts),
                dtype=draw.choice(("f32", "bf16", "bf16", "f16")),
                cast=cast,
                offset=offset,
                factor=draw.choice((1.0, 0.22)) if op.startswith("add_") else 1.0,
            )
        )
    return made


def laid_out(rand, case: Case, layout: str, scale: float = 1.0) -> Tensor:
    *leading, width = case.shape
    dtype = DTYPES[case.dtype]
    if layout == "sliced":
        return rand(*leading, 3 * width, dtype=dtype, scale=scale)[..., width : 2 * width]
    if layout == "heads":
        batch, heads, tokens = leading
        return rand(batch, tokens, heads, width, dtype=dtype, scale=scale).transpose(1, 2)
    return rand(*case.shape, dtype=dtype, scale=scale)


def plain(case: Case, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum and its norm, as transformers writes them, in the leaves' dtype: float64 has no roundings."""
    x, *rest = leaves
    total = x.clone()
    if case.adds:
        delta, *rest = rest
        total = x + (delta if case.factor == 1.0 else case.factor * delta)
    wide = total if x.dtype == torch.float64 else total.float()
    weight, *bias = (leaf.to(wide.dtype) for leaf in rest)
    if case.centred:
        y = torch.nn.functional.layer_norm(wide, weight.shape, weight, bias[0] if bias else None, EPS)
        return total, y.to(x.dtype)
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if case.cast == "before":
        return total, rest[0] * normal.to(x.dtype)
    return total, (normal * (case.offset + weight)).to(x.dtype)


def plain_results(case: Case, ins: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in ins]
    total, y = plain(case, leaves)
    return [total.detach(), y.detach(), *torch.autograd.grad((total, y), leaves, dys)]


def our_results(case: Case, ins: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    """A residual sum's norm as the graph differentiates it; a norm alone with the cotangent that waits at x."""
    bias = [None] if case.centred and case.cast == "before" else []
    places = range(len(ins))
    if case.adds:
        outs, grads, ran = forward_and_gradients(case.op, [*ins, *bias], dys, places, **case.attrs)
        assert ran[0] == case.op
        assert ran[1] == f"{case.op.removeprefix('add_')}_bwd"
        return [*outs, *grads]
    y, *saved = apply(case.op, *ins, **case.attrs)
    needs = (True,) * len(ins) + (False,) * len(bias)
    made = apply(f"{case.op}_bwd", *ins, *bias, *saved, dys[1], dys[0], needs=needs, **case.attrs)
    return [ins[0], y, *made]


def check(case: Case, rand) -> None:
    mixed = case.layout == "mixed"
    count = 2 if case.adds else 1
    xs = [laid_out(rand, case, "heads" if mixed else case.layout, scale) for scale in (3.0, 2.0)[:count]]
    biased = case.centred and case.cast == "after"
    ins = [*xs, *(rand(case.shape[-1], dtype=DTYPES[case.dtype]) for _ in range(2 if biased else 1))]
    dys = [laid_out(rand, case, "dense" if mixed else case.layout) for _ in range(2)]
    wide = [tensor.double() for tensor in ins]
    reference = plain_results(case, wide, [dy.double() for dy in dys])
    ours, plains = our_results(case, ins, dys), plain_results(case, ins, dys)
    # dx is a difference of terms of the size of rstd * g: roundings are relative to them.
    spread = reference[0] - reference[0].mean(-1, keepdim=True) if case.centred else reference[0]
    rstd = torch.rsqrt(spread.pow(2).mean(-1, keepdim=True) + EPS)
    term = float((rstd * dys[1].double() * (case.offset + wide[count])).abs().max())
    names = ["sum", "y", *("dx", "ddelta")[:count], "dw", "db"]
    for name, value, true, other in zip(names, ours, reference, plains, strict=False):
        largest = float(true.abs().max())
        assert value.dtype == DTYPES[case.dtype]
        assert_close(name, value, true, other, scale=max(largest, term) if name in ("dx", "ddelta") else largest)


@pytest.mark.parametrize("case", [case for op in OPS for case in cases(op)], ids=str)
def test_within_the_derived_bound(rand, case):
    check(case, rand)


ADDED = Case(op="add_rms_norm", shape=(5, 96), cast="after", offset=1.0, factor=0.5)
CENTRED = replace(ADDED, op="add_layer_norm")
ALONE = replace(ADDED, op="rms_norm", factor=1.0)
MUTATIONS = {
    "the mean term left out": (ALONE, {"grad - normal * tilt[:, None]": "grad"}),
    "the waiting cotangent dropped": (ALONE, {"out += tl.load(at": "out += 0.0 * tl.load(at"}),
    "the offset dropped": (ALONE, {"offset + vector": "vector"}),
    "the factor dropped": (ADDED, {"factor * tl.load": "tl.load"}),
    "the norm of x instead of the sum": (ADDED, {"value = rounded.to(tl.float32)": "value -= factor * 1.0"}),
    "the last row skipped": (ALONE, {"(row < rows)[:, None]": "(row < rows - 1)[:, None]"}),
    "a partial sum skipped": (ALONE, {"(row < stop)": "(row < stop - 1)"}),
    "eps dropped": (replace(ALONE, shape=(3, 5)), {"/ width + eps": "/ width + eps * 30000"}),
    "db summed where dw lies": (CENTRED, {"which * first_rows, first_rows +": "0 * which, first_rows + 0 *"}),
    "layer: the mean of g left out": (CENTRED, {"grad - level[:, None] -": "grad -"}),
    "layer: the tilt left out": (CENTRED, {" - normal * tilt[:, None]": ""}),
    "layer: the waiting cotangent dropped": (CENTRED, {"out += tl.load(at": "out += 0.0 * tl.load(at"}),
    "layer: the mean not subtracted": (CENTRED, {"value - middle[:, None], 0.0": "value, 0.0"}),
    "layer: the bias dropped": (CENTRED, {"out += vector(bias, col, width)[None, :]": "out += 0.0"}),
    "layer: the last row skipped": (CENTRED, {"(row < rows)[:, None]": "(row < rows - 1)[:, None]"}),
}


@pytest.mark.parametrize("case", [ADDED, CENTRED, ALONE], ids=str)
def test_the_kernels_themselves_pass(rand, case):
    check(case, rand)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_kernel_fails(rand, monkeypatch, tmp_path, name):
    case, edits = MUTATIONS[name]
    module, place = (layer_kernels, "layer_kernels") if name.startswith("layer") else (kernels, "kernels")
    monkeypatch.setattr(rules, place, mutated(module, edits, tmp_path))
    assert fails(lambda: check(case, rand))


@pytest.mark.parametrize("op", ["add_rms_norm", "add_layer_norm"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_what_nothing_reads_has_no_part_in_the_gradient(rand, same, op, factor):
    """Of a sum whose norm nobody reads, the cotangent passes; of a norm whose sum nobody reads, none waits."""
    case = Case(op=op, shape=(5, 33), factor=factor)
    x, delta, weight, dsum, dy = rand(5, 33), rand(5, 33), rand(33), rand(5, 33), rand(5, 33)
    ins = [x, delta, weight, *([None] if case.centred else [])]
    _, (dx, ddelta), ran = forward_and_gradients(op, ins, (dsum, None), (0, 1), **case.attrs)
    same(dx, dsum)
    same(ddelta, factor * dsum)
    assert "norm_bwd" not in " ".join(ran)
    _, (alone,), _ = forward_and_gradients(op, ins, (None, dy), (0,), **case.attrs)
    _, (both,), _ = forward_and_gradients(op, ins, (torch.zeros_like(dy), dy), (0,), **case.attrs)
    same(alone, both)


@pytest.mark.parametrize("op", ["add_rms_norm", "add_layer_norm"])
def test_an_unread_result_is_not_stored_and_changes_nothing(rand, same, op):
    case = Case(op=op, shape=(5, 33))
    ins = (rand(5, 33), rand(5, 33), rand(33), *([None] if case.centred else []))
    whole = apply(op, *ins, **case.attrs)
    for place, expected in enumerate(whole):
        outs = [None] * len(whole)
        outs[place] = torch.full_like(expected, float("nan"))
        bind(op, ins, tuple(outs), **case.attrs)
        same(outs[place], expected)


@pytest.mark.parametrize(("total_over", "y_over"), [(0, 1), (1, 0)])
def test_sum_and_norm_may_take_the_places_of_what_is_added(rand, same, total_over, y_over):
    ins = [rand(5, 1030), rand(5, 1030), rand(1030)]
    total, y, _ = apply("add_rms_norm", *ins, eps=EPS, factor=0.5)
    attrs = {"eps": EPS, "weight_cast": "before", "offset": 0.0, "factor": 0.5}
    bind("add_rms_norm", tuple(ins), (ins[total_over], ins[y_over], None), **attrs)
    same(ins[total_over], total)
    same(ins[y_over], y)


@pytest.mark.parametrize("limit", [8192, 128])
@pytest.mark.parametrize("over", ["x", "dy", "acc"])
def test_dx_may_take_the_place_of_what_it_is_made_of(rand, same, monkeypatch, over, limit):
    """Also where another kernel reads x and dy for the weight's gradient."""
    monkeypatch.setattr(rules.common, "MAX_FUSED_WIDTH", limit)
    given = {name: rand(5, 133) for name in ("x", "dy", "acc")}
    weight, rstd, dw = rand(133), rand(5).abs(), rand(133)
    attrs = {"needs": (True, True), "eps": EPS, "weight_cast": "before", "offset": 0.0}
    expected = apply("rms_norm_bwd", given["x"], weight, rstd, given["dy"], given["acc"], **attrs)
    bind("rms_norm_bwd", (given["x"], weight, rstd, given["dy"], given["acc"]), (given[over], dw), **attrs)
    same(given[over], expected[0])
    same(dw, expected[1])


@pytest.mark.parametrize("op", OPS)
def test_a_backward_pass_is_two_launches(rand, op):
    """The kernel, and one for the sums of weight and bias together."""
    case = Case(op=op, shape=(5, 33), cast="after")
    x, weight, stat = rand(5, 33), rand(33), rand(5)
    ins = (x, weight, weight, stat, stat, x, x) if case.centred else (x, weight, stat, x, x)
    needs = (True,) * (3 if case.centred else 2)
    outs = (torch.empty_like(x), *(torch.empty_like(weight) for _ in needs[1:]))
    attrs = {key: value for key, value in case.attrs.items() if key != "factor"}
    name = f"{op.removeprefix('add_')}_bwd"
    assert [call.name for call in launches(name, ins, outs, needs=needs, **attrs)] == [name, "column_sums"]


def launches(op: str, ins: tuple, outs: tuple, **attrs) -> list:
    run = immediate(ins[0].device)
    RULES.lower(node_of(op, ins, attrs)).bind(run, ins, outs, **attrs)
    return run.calls


def bind(op: str, ins: tuple, outs: tuple, **attrs) -> None:
    for call in launches(op, ins, outs, **attrs):
        call()
