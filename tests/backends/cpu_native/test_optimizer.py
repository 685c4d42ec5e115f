"""Weights of bfloat16, with masters and without: the whole update is one native call, as near float64 as torch's own;
what is stored in bfloat16 is the rounding of what float32 state would hold."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.cpu_native import PLANNED
from smedjan.backends.planned.immediate import node_of
from smedjan.graph.rewrite import decompose
from smedjan.optim.adamw import AdamW
from smedjan.runtime.select import backend
from tests.conftest import assert_bits
from tests.tolerances import assert_close

SHAPES = {"a": ((17, 33), "bfloat16"), "b": ((129,), "bfloat16"), "c": ((1, 5), "bfloat16")}
LR, STEP = 1e-2, 3


def inputs(dtype: torch.dtype) -> dict[str, object]:
    """The same numbers in every dtype: what bfloat16 holds is held by the wider ones."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, (shape, _) in SHAPES.items():
        draw = [torch.randn(shape, generator=generator) for _ in range(4)]
        weight, grad = draw[0].bfloat16(), draw[1].bfloat16()
        made |= {name: weight, f"grad.{name}": grad.to(dtype if dtype == torch.float64 else torch.bfloat16)}
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        made[f"master.{name}"] = weight.to(wide)
        made |= {f"exp_avg.{name}": (draw[2] * 0.1).to(wide), f"exp_avg_sq.{name}": (draw[3] ** 2 * 0.01).to(wide)}
    return made


def reference() -> dict[str, torch.Tensor]:
    """Loshchilov & Hutter 2019, algorithm 2, after torch.nn.utils.clip_grad_norm_."""
    given, adamw = inputs(torch.float64), AdamW(master=True, weight_decay=0.1)
    norm = torch.cat([given[f"grad.{name}"].flatten() for name in SHAPES]).norm()
    made = {"grad_norm": norm}
    for name in SHAPES:
        g = given[f"grad.{name}"] * min(1.0, adamw.clip / (norm + 1e-6))
        p = given[f"master.{name}"] * (1 - LR * adamw.weight_decay)
        m = adamw.beta1 * given[f"exp_avg.{name}"] + (1 - adamw.beta1) * g
        v = adamw.beta2 * given[f"exp_avg_sq.{name}"] + (1 - adamw.beta2) * g * g
        root = (v / (1 - adamw.beta2**STEP)).sqrt() + adamw.eps
        p = p - LR * m / (1 - adamw.beta1**STEP) / root
        made |= {f"master.{name}": p, f"exp_avg.{name}": m, f"exp_avg_sq.{name}": v, name: p}
    return made


@pytest.mark.parametrize("weight_decay", [0.1])
def test_masters_are_updated_in_one_call(weight_decay):
    adamw, wide = AdamW(master=True, weight_decay=weight_decay), reference()
    scalars = {"lr": LR, "step": STEP}
    fast = backend("cpu_native")
    program = fast.program(decompose(adamw.graph(SHAPES, exact=False, buckets=True), fast.rules.has))
    ran = {row["op"]: row["lowering"] for row in program.lowerings()}
    assert ran == {"norm_and_clip": "native global_norm", "adamw_bucket": "native adamw"}
    exact = backend("torch_reference")
    plain = exact.program(decompose(adamw.graph(SHAPES, exact=True), exact.rules.has))
    made, beside = program({**inputs(torch.bfloat16), **scalars}), plain({**inputs(torch.bfloat16), **scalars})
    assert set(made) == set(beside) == set(wide)
    for name, value in wide.items():
        assert_close(name, made[name], value, beside[name])


def apply(lists: list[list[torch.Tensor]], norm: float = 2.0) -> list[torch.Tensor]:
    """New params and moments of these, and gradients; all are copied before."""
    given = [[array.clone() for array in each] for each in lists]
    attrs = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "sites": tuple(range(len(lists[0])))}
    ins = (*(array for each in given for array in each), LR, STEP, None, torch.tensor(0.5), torch.tensor(norm))
    rule = PLANNED.lower(node_of("adamw_bucket", ins, attrs))
    assert rule.label == "native adamw"
    attrs |= {"eight_bit": False, "narrow": "", "stochastic": (False, False)}
    rule.run(*ins, **attrs)
    return [*given[0], *given[2], *given[3]]


def state(param: torch.dtype, grad: torch.dtype, moments: torch.dtype) -> list[list[torch.Tensor]]:
    """Numbers that bfloat16 holds, of sizes that fill no vector, one and several."""
    generator = torch.Generator().manual_seed(1)
    draw = [[torch.randn(size, generator=generator).bfloat16() for size in (1, 15, 16, 1000)] for _ in range(4)]
    draw[3] = [array**2 for array in draw[3]]
    return [[array.to(d) for array in each] for each, d in zip(draw, (param, grad, moments, moments), strict=True)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_is_the_rounding_of_float32_state(build, grad, moments, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = apply(state(torch.bfloat16, grad, moments))
        wide = apply(state(torch.float32, grad, torch.float32))
    finally:
        torch.set_num_threads(before)
    for at, (ours, exact) in enumerate(zip(made, wide, strict=True)):
        assert_bits(ours, exact.to(ours.dtype), f"array {at}")


def test_a_norm_that_is_not_finite_changes_nothing(build):
    given = state(*(torch.bfloat16,) * 3)
    for norm in (float("nan"), float("inf")):
        for at, (ours, old) in enumerate(zip(apply(given, norm), given[0] + given[2] + given[3], strict=True)):
            assert_bits(ours, old, f"array {at}")


def test_without_masters_too():
    """Parameters, gradients and moments of bfloat16, as `optim.master false` has them."""
    adamw, given, wide = AdamW(master=False, weight_decay=0.1), inputs(torch.bfloat16), inputs(torch.float64)
    for each in (given, wide):
        for name in SHAPES:
            del each[f"master.{name}"]
            for kind in ("exp_avg", "exp_avg_sq"):
                array = given[f"{kind}.{name}"].bfloat16()
                each[f"{kind}.{name}"] = array if each is given else array.double()
                if each is wide:
                    wide[name] = given[name].double()
    scalars = {"lr": LR, "step": STEP}
    fast, exact = backend("cpu_native"), backend("torch_reference")
    program = fast.program(decompose(adamw.graph(SHAPES, exact=False, buckets=True), fast.rules.has))
    ran = {row["op"]: row["lowering"] for row in program.lowerings()}
    assert ran == {"norm_and_clip": "native global_norm", "adamw_bucket": "native adamw"}
    copied = {name: array.clone() for name, array in given.items()}
    made = program({**copied, **scalars})
    plain = exact.program(decompose(adamw.graph(SHAPES, exact=True), exact.rules.has))
    beside = plain({**{name: array.clone() for name, array in given.items()}, **scalars})
    true = plain({**wide, **scalars})
    assert set(made) == set(beside) == set(true)
    for name, value in true.items():
        assert_close(name, made[name], value.double(), beside[name])
