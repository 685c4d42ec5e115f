"""Weights of bfloat16 with masters: the whole update is one native call, as near float64 as torch's own is."""

from __future__ import annotations

import pytest
import torch

from smedjan.graph.rewrite import decompose
from smedjan.optim.adamw import AdamW
from smedjan.runtime.select import backend
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
