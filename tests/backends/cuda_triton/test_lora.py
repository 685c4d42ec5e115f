"""Layers with adapters, alone and several of one input, on Triton and cuBLAS against float64 torch and autograd."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from smedjan.backends.cuda_triton import lora as rules
from smedjan.backends.cuda_triton import tuned
from smedjan.backends.cuda_triton.apply import apply
from smedjan.backends.cuda_triton.kernels import lora as kernels
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.immediate import immediate, node_of
from smedjan.backends.planned.launch import Launch, Launches
from tests.backends.cuda_triton.mutate import fails, mutated
from tests.tolerances import assert_close

SMALL = {
    "lora_low": {"M": 32, "N": 32, "K": 32},
    "lora_matmul": {"M": 32, "N": 32, "K": 32, "R": 16, "GROUP": 2},
    "lora_matmul_dx": {"M": 32, "N": 32, "K": 32, "R": 16, "GROUP": 2},
    "lora_grads": {"M": 16, "N": 32, "R": 32},
}
"""Launch shapes with which a few rows and columns take several programs and several steps of each loop."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


SHIPPED = tuned.options


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    def options(kernel: str, shape_class: str) -> dict:
        return {**SMALL[kernel], "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}

    monkeypatch.setattr(tuned, "options", options)


@pytest.fixture
def _shipped(_small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "options", SHIPPED)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`adapted` has a letter a member: "a" where it has an adapter, "-" where not."""

    rows: tuple[int, ...] = (20,)
    depth: int = 32
    widths: tuple[int, ...] = (48, 16, 16)
    rank: int = 8
    adapted: str = "aaa"
    biased: bool = False
    waiting: bool = True
    strided: bool = False
    together: bool = True
    scaling: float = 0.75
    dtype: str = "bfloat16"

    @property
    def attrs(self) -> dict:
        return {"adapted": self.flags, "scaling": self.scaling, "together": self.together}

    @property
    def flags(self) -> tuple[bool, ...]:
        return tuple(letter == "a" for letter in self.adapted)

    def __str__(self) -> str:
        size = f"{'x'.join(map(str, self.rows))}x{self.depth} {'+'.join(map(str, self.widths))} r{self.rank}"
        marks = ["bias" * self.biased, "acc" * self.waiting, "strided" * self.strided, "apart" * (not self.together)]
        return " ".join((self.dtype.replace("float", "f"), size, self.adapted, *filter(None, marks)))


def generated() -> list[Case]:
    """40 cases of a seed: row counts, widths, ranks, members and dtypes in combinations that nobody chose."""
    draw = random.Random(5)
    made = []
    for number in range(40):
        members = 1 + number % 4
        head = draw.choice((8, 12))
        widths = draw.choice(
            (
                tuple(draw.choice((1, 7, 16, 33, 40)) for _ in range(members)),
                (head * draw.choice((1, 2, 4)), head, head, head)[:members],
                (32,) * members,
            )
        )
        adapted = "".join(draw.choice("aaa-") for _ in widths)
        dtype = "float32" if number % 3 == 2 else "bfloat16"
        rows = draw.choice(((1,), (2,), (5,), (2, 3), (16,), (33,), (2, 20), (70,)))
        made.append(
            Case(
                rows=rows,
                depth=draw.choice((1, 8, 17, 32, 50, 64)),
                widths=widths,
                rank=draw.choice((1, 3, 8, 16, 20)),
                adapted=adapted if "a" in adapted else "a" + adapted[1:],
                biased=draw.random() < 0.4,
                waiting=draw.random() < 0.6,
                strided=draw.random() < 0.4,
                together=draw.random() < 0.7,
                scaling=draw.choice((0.25, 1.0, 2.0)),
                dtype=dtype,
            )
        )
    return made


MUTATED = Case(rows=(67,), depth=33, widths=(12, 8, 12), adapted="a-a", rank=5, biased=True)

CASES = [
    *generated(),
    MUTATED,
    Case(),
    Case(rows=(1,)),
    Case(rows=(130,), widths=(8,), adapted="a", depth=16),
    Case(rows=(2,), widths=(33, 8), adapted="aa", rank=64),
    Case(biased=True, adapted="a-a", strided=True),
    Case(adapted="--a", together=False, waiting=False),
    Case(widths=(64, 64), adapted="aa", depth=64, rank=16, rows=(64,)),
    Case(dtype="float32", biased=True, adapted="-a-", together=False),
    Case(dtype="float32", waiting=False),
]


@dataclass
class Inputs:
    case: Case
    x: Tensor
    dy: Tensor
    acc: Tensor | None
    weights: list[Tensor]
    biases: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.biases, *self.a, *self.b]

    @property
    def frozen(self) -> list[Tensor]:
        """The backward op's tensors."""
        return [*self.weights, *self.a, *self.b]


def inputs(case: Case, rand: Callable[..., Tensor]) -> Inputs:
    """B is no smaller than W: an error of the adapters' must show in y."""
    dtype = DTYPES[case.dtype]

    def rows(width: int) -> Tensor:
        if not case.strided:
            return rand(*case.rows, width, dtype=dtype)
        return rand(*case.rows, width + 13, dtype=dtype)[..., 5 : 5 + width]

    widths = [width for width, has in zip(case.widths, case.flags, strict=True) if has]
    return Inputs(
        case=case,
        x=rows(case.depth),
        dy=rows(sum(case.widths)),
        acc=rows(case.depth) if case.waiting else None,
        weights=[rand(width, case.depth, dtype=dtype, scale=case.depth**-0.5) for width in case.widths],
        biases=[rand(width, dtype=dtype) for width in case.widths] if case.biased else [],
        a=[rand(case.rank, case.depth, scale=case.depth**-0.5) for _ in widths],
        b=[rand(width, case.rank, scale=case.rank**-0.5) for width in widths],
    )


def plain(given: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, low and every gradient by the definition: the base in `dtype`, adapters in float32 (of float64: all in it).

    The base is one product and all of A are one, as here: per member, torch would round dx once a member, and sum in
    shorter pieces.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = given.x.to(dtype, copy=True).requires_grad_()
    a, b = ([t.to(wide, copy=True).requires_grad_() for t in tensors] for tensors in (given.a, given.b))
    bias = torch.cat(given.biases).to(dtype) if given.biases else None
    base = linear(x, torch.cat(given.weights).to(dtype), bias).split(given.case.widths, -1)
    low = linear(x.to(wide), torch.cat(a))
    adapters = iter(zip(low.split(given.case.rank, -1), b, strict=True))
    parts = []
    for y, has in zip(base, given.case.flags, strict=True):
        if has:
            part, up = next(adapters)
            y = (y.to(wide) + given.case.scaling * linear(part, up)).to(dtype)
        parts.append(y)
    y = torch.cat(parts, -1)
    dx, *grads = torch.autograd.grad(y, [x, *a, *b], given.dy.to(dtype))
    if given.acc is not None:
        dx = given.acc.to(dtype) + dx
    found = {"y": y.detach(), "low": low.detach(), "dx": dx}
    return found | {f"d{name}": grad for name, grad in zip(names(given), grads, strict=True)}


def names(given: Inputs) -> list[str]:
    return [f"{letter}{index}" for letter in "ab" for index in range(len(given.a))]


def group(given: Inputs) -> dict[str, Tensor]:
    """y, low and every gradient by the rules."""
    case = given.case
    y, low = apply("lora_linear_group", given.x, *given.tensors, biased=case.biased, **case.attrs)
    made = backward(given, low, needs=(True, True))
    return {"y": y, "low": low, "dx": made[0]} | {f"d{n}": grad for n, grad in zip(names(given), made[1:], strict=True)}


def backward(given: Inputs, low: Tensor, *, needs: tuple[bool, bool]) -> tuple[Tensor, ...]:
    ins = (given.dy, given.x, low, given.acc, *given.frozen)
    made = apply("lora_linear_group_bwd", *ins, needs=needs, **given.case.attrs)
    return made if isinstance(made, tuple) else (made,)


def magnitudes(given: Inputs) -> dict[str, Tensor]:
    """The same sums of their terms' magnitudes: what float32 rounds where terms cancel."""
    positive = {
        name: [t.abs() for t in value] if isinstance(value, list) else value.abs()
        for name, value in vars(given).items()
        if value is not None and name != "case"
    }
    return plain(replace(given, **positive), torch.float64)


def check(given: Inputs, made: dict[str, Tensor] | None = None) -> None:
    """Results in float32 are sums of sums in another order than torch's, and few: one may cancel where torch's rounding
    errors did, too. Those of bfloat16 are rounded to it, which hides that."""
    made = group(given) if made is None else made
    reference, ours, terms = plain(given, torch.float64), plain(given, given.x.dtype), magnitudes(given)
    assert made.keys() == reference.keys()
    for name, value in made.items():
        assert value.dtype == ours[name].dtype, name
        scale = float(terms[name].max()) if value.dtype == torch.float32 else None
        assert_close(name, value, reference[name], ours[name], scale=scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_are_within_the_derived_bound(rand, case):
    check(inputs(case, rand))


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_alone_is_a_group_of_one(rand, same, dtype, biased):
    given = inputs(Case(widths=(33,), adapted="a", rank=5, biased=biased, dtype=dtype), rand)
    (bias,) = given.biases or (None,)
    expected = group(given)
    y, low = apply("lora_linear", given.x, given.weights[0], bias, given.a[0], given.b[0], scaling=0.75)
    same(y, expected["y"])
    same(low, expected["low"])
    for needs in ((True, True, True), (False, True, True), (True, False, True), (False, True, False)):
        ins = (given.dy, given.x, given.weights[0], given.a[0], given.b[0], low, given.acc)
        made = apply("lora_linear_bwd", *ins, needs=needs, scaling=0.75)
        found = iter(made if isinstance(made, tuple) else (made,))
        for name, need in zip(("dx", "da0", "db0"), needs, strict=True):
            if need:
                same(next(found), expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_gradient_alone_has_the_bits_of_all_together(rand, same, dtype):
    given = inputs(Case(dtype=dtype, adapted="a-a"), rand)
    low = plain(given, given.x.dtype)["low"]
    both = backward(given, low, needs=(True, True))
    for value, other in zip(backward(given, low, needs=(True, False)), both[:1], strict=True):
        same(value, other)
    for value, other in zip(backward(given, low, needs=(False, True)), both[1:], strict=True):
        same(value, other)


def test_weights_that_lie_apart_give_the_same(rand, same):
    given = inputs(Case(adapted="a-a", biased=True), rand)
    apart = replace(given, case=replace(given.case, together=False))
    one, other = group(given), group(apart)
    for name, value in one.items():
        same(value, other[name])


def bound(op: str, ins: tuple, outs: tuple, **attrs) -> list[Launch]:
    """Runs the rule on results of the caller's; gives its launches."""
    node = node_of(op, ins, attrs)
    run = immediate(ins[0].device)
    RULES.lower(node).bind(run, ins, outs, **node.attrs)
    for call in run.calls:
        call()
    return run.calls


@pytest.mark.parametrize("over", ["acc", "x", "neither"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_in_the_places_of_dead_inputs_and_unread_ones(rand, same, dtype, over):
    """dx over the waiting cotangent or over x; y and low inside wider buffers; gradients that nobody reads."""
    given = inputs(Case(dtype=dtype, adapted="a-a"), rand)
    expected = group(given)
    rows, wide = given.x.shape[0], sum(given.case.widths)
    y = torch.full((rows, wide + 3), float("nan"), dtype=given.x.dtype, device=given.x.device)
    low = torch.full((rows, 16 + 1), float("nan"), device=given.x.device)
    outs = (y[:, 1 : wide + 1], low[:, :16])
    bound("lora_linear_group", (given.x, *given.tensors), outs, biased=False, **given.case.attrs)
    same(outs[0], expected["y"])
    same(outs[1], expected["low"])
    assert bool(y[:, 0].isnan().all() & y[:, wide + 1 :].isnan().all() & low[:, 16:].isnan().all())
    bound("lora_linear_group", (given.x, *given.tensors), (outs[0], None), biased=False, **given.case.attrs)
    same(outs[0], expected["y"])
    dx = {"acc": given.acc, "x": given.x, "neither": None}[over]
    db1 = torch.full_like(given.b[1], float("nan"))
    ins = (given.dy, given.x, low[:, :16], given.acc, *given.frozen)
    bound("lora_linear_group_bwd", ins, (dx, None, None, None, db1), needs=(True, True), **given.case.attrs)
    same(db1, expected["db1"])
    if dx is not None:
        same(dx, expected["dx"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(rand, dtype):
    given = inputs(Case(rows=(0,), dtype=dtype), rand)
    made = group(given)
    assert made["y"].shape == (0, 80)
    assert made["dx"].shape == (0, 32)
    assert all(not made[f"d{name}"].any() for name in names(given))


def launches(op: str, ins: list, **attrs) -> list[Launch]:
    """What the rule starts, on arrays without memory."""
    node = node_of(op, ins, attrs)

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: object = None) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    run = Launches(
        torch.device("meta"), scratch=empty, host=lambda function, scalars: empty((), torch.float32), allocate=empty
    )
    outs = tuple(empty(out.shape, getattr(torch, out.dtype)) for out in node.outputs)
    RULES.lower(node).bind(run, tuple(ins), outs, **node.attrs)
    return run.calls


@pytest.mark.usefixtures("_shipped")
@pytest.mark.parametrize("adapted", ["aaa", "a-a"])
@pytest.mark.parametrize("rows", [1, 64, 500, 8192])
def test_a_group_takes_two_launches_forward_and_four_backward(rows, adapted):
    """Whatever the members: q, k and v one at a time are 6 and 12."""
    case = Case(rows=(rows,), depth=1024, widths=(2048, 1024, 1024), rank=16, adapted=adapted, biased=True)
    given = inputs(case, lambda *shape, dtype=torch.float32, **_: torch.empty(shape, dtype=dtype, device="meta"))
    forward = launches("lora_linear_group", [given.x, *given.tensors], biased=True, **case.attrs)
    assert [call.name for call in forward] == ["lora_low", "lora_matmul"]
    low = torch.empty(rows, 16 * len(given.a), device="meta")
    ins = [given.dy, given.x, low, given.acc, *given.frozen]
    backwards = launches("lora_linear_group_bwd", ins, needs=(True, True), **case.attrs)
    assert [call.name for call in backwards] == ["lora_low", "lora_grads", "lora_sum", "lora_matmul_dx"]
    names = Counter(call.name for call in launches("lora_linear_group_bwd", ins, needs=(False, True), **case.attrs))
    assert set(names) == {"lora_low", "lora_grads", "lora_sum"}


@pytest.mark.usefixtures("_shipped")
@pytest.mark.parametrize("rows", [3, 40, 70])
def test_shipped_launch_shapes(rand, rows):
    """Every class of rows once, over more than one block."""
    check(inputs(Case(rows=(rows,), depth=130, widths=(140, 72), adapted="aa", rank=20, biased=True), rand))


MUTATIONS = {
    "scaling left out of y": ("other=0.0) * scale\n", "other=0.0)\n"),
    "scaling left out of g": ("(leading + trailing) * scale", "leading + trailing"),
    "scaling left out of dB": ("COUNT), RANK, scale\n", "COUNT), RANK, 1.0\n"),
    "another member's B": ("(skipped + inner_col)", "inner_col"),
    "another member's low": ("+ slot * RANK\n    at_b", "\n    at_b"),
    "another member's weights": ("_pick(member, w0, w1, w2, w3, COUNT) + inner_col", "w0 + inner_col"),
    "an adapter where there is none": ("RANK * ((ADAPTED >> member) & 1)", "RANK"),
    "the waiting cotangent dropped": ("    if waiting is not None:", "    if False:"),
    "the bias dropped": ("    if bias is not None:", "    if False:"),
    "the last step of y skipped": ("for start in range(0, depth, K)", "for start in range(0, depth - K, K)"),
    "the last step of dx skipped": ("for step in range(0, steps)", "for step in range(0, steps - 1)"),
    "the last step of low skipped": ("for start in range(0, width, K)", "for start in range(0, width - K, K)"),
    "the last rows' gradients skipped": ("(split + 1) * chunk, rows), M)", "(split + 1) * chunk, rows) - M, M)"),
    "one split's sum left out": ("for _ in range(0, splits)", "for _ in range(0, splits - 1)"),
    "float32 in two bfloat16": ("middle, narrow(rest - middle.to(tl.float32)", "middle, narrow(rest - rest"),
    "adapters out of dx": ("tl.range(0, RANKS, R, num_stages=1)", "tl.range(0, 0, R, num_stages=1)"),
}


@pytest.mark.parametrize("edit", MUTATIONS.values(), ids=list(MUTATIONS))
def test_a_wrong_kernel_is_out_of_bound(rand, monkeypatch, tmp_path, edit):
    given = inputs(MUTATED, rand)
    monkeypatch.setattr(rules, "kernels", mutated(kernels, dict([edit]), tmp_path))
    assert fails(lambda: check(given))
