"""Muon, Lion, Adafactor and Sophia against their peers: to the bit where exact, else within the bound.

The peers: torch.optim.Muon beside torch.optim.AdamW; mlx.optimizers.Lion; transformers' Adafactor; for Sophia, which no
installed library has, the paper's algorithm 3 written down in float64. torch.optim.Muon iterates in bfloat16: the truth
is the same source in float64.
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
import torch
import transformers
from torch.optim import _muon

from smedjan.backends.torch_reference.optimizer import quantize_blocks
from smedjan.errors import ConfigError
from smedjan.graph.rewrite import cse, decompose, distinct_outputs, prune
from smedjan.optim import base
from smedjan.optim.adafactor import Adafactor
from smedjan.optim.base import Optimizer
from smedjan.optim.lion import Lion
from smedjan.optim.muon import Muon
from smedjan.optim.sophia import Sophia
from smedjan.runtime.select import backend
from tests.tolerances import assert_near

SHAPES = {"layers.0.up.weight": (24, 10), "layers.0.down.weight": (10, 24), "embed.weight": (12, 10), "norm": (10,)}
RATES = [1e-2, 3e-3, 1e-3]
FAST = ("cpu_native", "cuda_triton", "mlx_metal")
Arrays = dict[str, torch.Tensor]

CHOICES: dict[str, Optimizer] = {
    "muon original": Muon(adjust="original", apart=("embed",), adamw_rate=0.5, weight_decay=0.1, clip=0.5),
    "muon rms": Muon(apart=("embed",), rates=(("up", 4.0),), clip=0.0),
    "lion": Lion(weight_decay=0.1, clip=0.5),
    "adafactor": Adafactor(weight_decay=0.1, clip=0.5),
    "adafactor plain": Adafactor(clip=0.0),
    "sophia": Sophia(weight_decay=0.1, clip=0.5),
}


def draw() -> tuple[Arrays, list[Arrays]]:
    """Parameters to start from and a gradient for each step."""
    generator = torch.Generator().manual_seed(3)
    start, *grads = [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in (None, *RATES)
    ]
    return start, grads


def hessian(name: str) -> torch.Tensor:
    """A diagonal as after some estimates: values that clip and values that do not."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.rand(SHAPES[name], generator=generator) * 20


def peers(optimizer: Optimizer, leaves: Arrays) -> list[torch.optim.Optimizer]:
    rates = {name: optimizer.rate(name) for name in leaves}
    if isinstance(optimizer, Muon):
        ours = [name for name in leaves if optimizer.is_matrix(name, SHAPES[name])]
        return [
            torch.optim.Muon(
                [{"params": [leaves[name]], "rate": rates[name]} for name in ours],
                weight_decay=optimizer.weight_decay,
                adjust_lr_fn=optimizer.adjust,
            ),
            torch.optim.AdamW(
                [{"params": [leaf], "rate": optimizer.others.rate(n)} for n, leaf in leaves.items() if n not in ours],
                weight_decay=optimizer.weight_decay,
                foreach=False,
            ),
        ]
    assert isinstance(optimizer, Adafactor)
    groups = [{"params": [leaf], "rate": rates[name]} for name, leaf in leaves.items()]
    given = {"scale_parameter": False, "relative_step": False, "weight_decay": optimizer.weight_decay}
    return [transformers.Adafactor(groups, lr=1.0, **given)]


def theirs(optimizer: Optimizer, dtype: torch.dtype, start: Arrays, grads: list[Arrays]) -> Arrays:
    """Parameters and state after the peer's three steps."""
    leaves = {name: array.to(dtype, copy=True).requires_grad_() for name, array in start.items()}
    made = [] if isinstance(optimizer, Lion | Sophia) else peers(optimizer, leaves)
    state: dict[str, Any] = {}
    for rate, grad in zip(RATES, grads, strict=True):
        for name, leaf in leaves.items():
            leaf.grad = grad[name].to(dtype, copy=True)
        limit = optimizer.clip if optimizer.clip > 0 else float("inf")
        torch.nn.utils.clip_grad_norm_(leaves.values(), limit, foreach=False)
        for each in made:
            for group in each.param_groups:
                group["lr"] = rate * group["rate"]
            each.step()
        if not made:
            for name, leaf in leaves.items():
                written(optimizer, name, leaf.detach(), leaf.grad, rate, state)
    for each in made:
        for name, leaf in leaves.items():
            state.update({f"{kind}.{name}": value for kind, value in each.state.get(leaf, {}).items()})
    return {**{name: leaf.detach() for name, leaf in leaves.items()}, **state}


def written(optimizer: Optimizer, name: str, p: Any, g: Any, lr: float, state: dict[str, Any]) -> None:
    """Lion's algorithm 2 and Sophia's algorithm 3, as the papers have them; v_t and h are given."""
    m = state.setdefault(f"exp_avg.{name}", torch.zeros_like(p))
    p *= 1 - lr * optimizer.weight_decay
    if isinstance(optimizer, Lion):
        p -= lr * torch.sign(optimizer.beta1 * m + (1 - optimizer.beta1) * g)
        m.copy_(optimizer.beta2 * m + (1 - optimizer.beta2) * g)
    else:
        assert isinstance(optimizer, Sophia)
        state[f"hessian.{name}"] = hessian(name).to(p.dtype)
        m.copy_(optimizer.beta1 * m + (1 - optimizer.beta1) * g)
        p -= lr * torch.clamp(m / torch.clamp(optimizer.rho * state[f"hessian.{name}"], min=1e-15), -1, 1)


def ours(optimizer: Optimizer, on: str, dtype: torch.dtype, start: Arrays, grads: list[Arrays]) -> Arrays:
    kind, reference = str(dtype).removeprefix("torch."), backend("torch_reference")
    where = backend(on)
    specs = {name: (shape, kind) for name, shape in SHAPES.items()}
    graph = optimizer.graph(specs, exact=where.exact, buckets=not where.exact)
    program = where.program(distinct_outputs(cse(prune(decompose(graph, where.rules.has)))))

    def bound(array: torch.Tensor) -> Any:
        return where.from_raw(reference.to_raw(array))

    live = {name: bound(array.to(dtype)) for name, array in start.items()}
    for name, spec in optimizer.state(specs).items():
        what, _, of = name.partition(".")
        live[name] = bound(hessian(of)) if what == "hessian" else where.zeros(*spec)
    for step, (rate, grad) in enumerate(zip(RATES, grads, strict=False), 1):
        scalars = optimizer.scalars(specs, lr=rate, step=step, seed=0)
        live = program({**live, **{f"grad.{n}": bound(g.to(dtype)) for n, g in grad.items()}, **scalars})
        live.pop("grad_norm")
    return {name: reference.from_raw(where.to_raw(array)) for name, array in live.items()}


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if "sophia" not in choice and "lion" not in choice])
def test_exact_is_the_peers_bits(choice):
    start, grads = draw()
    expected = theirs(CHOICES[choice], torch.float32, start, grads)
    found = ours(CHOICES[choice], "torch_reference", torch.float32, start, grads)
    assert set(SHAPES) < found.keys() <= expected.keys()
    for name, array in found.items():
        assert torch.equal(array, expected[name]), name


@pytest.fixture(scope="module")
def truths() -> dict[str, Arrays]:
    source = textwrap.dedent(inspect.getsource(_muon._zeropower_via_newtonschulz))
    assert source.count(".bfloat16()") == 1
    scope: dict[str, Any] = dict(vars(_muon))
    exec(source.replace(".bfloat16()", ".double().clone()"), scope)
    start, grads = draw()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_muon, "_zeropower_via_newtonschulz", scope["_zeropower_via_newtonschulz"])
        return {choice: theirs(optimizer, torch.float64, start, grads) for choice, optimizer in CHOICES.items()}


@pytest.mark.parametrize("on", ["torch_reference", *FAST])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_backend_is_within_the_bound(choice, on, truths):
    start, grads = draw()
    plain = theirs(CHOICES[choice], torch.float32, start, grads)
    found = ours(CHOICES[choice], on, torch.float32, start, grads)
    assert set(SHAPES) < found.keys()
    # An iteration whose sums take a product onto a rounded multiple rounds five times to bfloat16, torch's three times.
    more = 5 / 3 if "muon" in choice and on in ("cuda_triton", "mlx_metal") else 1.0
    for name, array in found.items():
        truth = truths[choice][name]
        assert_near(name, array, truth, truth + more * (plain[name].double() - truth))


def test_lion_is_mlxs():
    start, grads = draw()
    optimizer = Lion(clip=0.0, weight_decay=0.1)
    peer = mlx.optimizers.Lion(learning_rate=RATES[0], betas=[0.9, 0.99], weight_decay=0.1)
    params = {name: mx.array(array.numpy()) for name, array in start.items()}
    for rate, grad in zip(RATES, grads, strict=True):
        peer.learning_rate = rate
        params = peer.apply_gradients({name: mx.array(array.numpy()) for name, array in grad.items()}, params)
    found = ours(optimizer, "torch_reference", torch.float32, start, grads)
    for name, array in params.items():
        # Three steps of three roundings each, of values below 4.
        np.testing.assert_allclose(np.array(array), found[name].numpy(), rtol=0, atol=9 * 4 * 2.0**-24)


@pytest.mark.parametrize(("choice", "kind"), [("muon rms", "momentum_buffer"), ("lion", "exp_avg")])
def test_eight_bit_moments_are_the_codes_of_the_wide_ones(choice, kind, monkeypatch):
    """After the first step, whose state was zeros in both."""
    monkeypatch.setattr(base, "EIGHT_BIT_FROM", 1)
    monkeypatch.setitem(SHAPES, "layers.0.up.weight", (32, 16))
    start, grads = draw()
    wide = ours(CHOICES[choice], "torch_reference", torch.float32, start, grads[:1])
    narrow = ours(replace(CHOICES[choice], state_dtype="8bit"), "torch_reference", torch.float32, start, grads[:1])
    assert torch.equal(wide["layers.0.up.weight"], narrow["layers.0.up.weight"])
    codes, absmax = quantize_blocks(wide[f"{kind}.layers.0.up.weight"], signed=True)
    assert torch.equal(narrow[f"{kind}.layers.0.up.weight"], codes)
    assert torch.equal(narrow[f"{kind}_absmax.layers.0.up.weight"], absmax)
    assert narrow["embed.weight"].dtype == narrow["exp_avg.embed.weight"].dtype == torch.float32


@pytest.mark.parametrize(("kind", "state"), [(Adafactor, "8bit"), (Adafactor, "bfloat16"), (Sophia, "8bit")])
def test_state_that_an_optimizer_does_not_keep(kind, state):
    with pytest.raises(ConfigError, match=rf"{kind.__name__} keeps no state of {state}"):
        kind(state_dtype=state)


def test_adafactors_state_is_a_row_and_a_column():
    kept = Adafactor().state({"w": ((7, 5), "bfloat16"), "e": ((2, 7, 5), "float32"), "b": ((3,), "float32")})
    assert kept == {
        "exp_avg_sq_row.w": ((7,), "float32"),
        "exp_avg_sq_col.w": ((5,), "float32"),
        "exp_avg_sq_row.e": ((2, 7), "float32"),
        "exp_avg_sq_col.e": ((2, 5), "float32"),
        "exp_avg_sq.b": ((3,), "float32"),
    }
