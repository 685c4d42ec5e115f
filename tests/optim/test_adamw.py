"""AdamW's graph follows torch.optim.AdamW and clip_grad_norm_: to the bit where exact, else within the bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.ops.optimizer import adamw_update
from smedjan.optim.adamw import AdamW
from smedjan.runtime.select import backend
from tests.tolerances import assert_close

SHAPES = {"w": (7, 5), "b": (3,), "v": (129,)}
RATES = [1e-2, 3e-3, 1e-3]
Arrays = dict[str, torch.Tensor]


def draw() -> tuple[Arrays, list[Arrays]]:
    """Parameters to start from and a gradient for each step."""
    generator = torch.Generator().manual_seed(3)
    start, *grads = [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in (None, *RATES)
    ]
    return start, grads


def torchs(optimizer: AdamW, dtype: torch.dtype, start: Arrays, grads: list[Arrays]) -> Arrays:
    """Parameters, moments and the norm of every step after torch's own three steps."""
    leaves = {name: array.to(dtype, copy=True).requires_grad_() for name, array in start.items()}
    peer = torch.optim.AdamW(
        [{"params": [leaf], "name": name} for name, leaf in leaves.items()],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        foreach=False,
        fused=False,
    )
    made: Arrays = {}
    for step, (rate, grad) in enumerate(zip(RATES, grads, strict=True)):
        for name, leaf in leaves.items():
            leaf.grad = grad[name].to(dtype, copy=True)
        limit = optimizer.clip if optimizer.clip > 0 else float("inf")
        made[f"norm{step}"] = torch.nn.utils.clip_grad_norm_(leaves.values(), limit, foreach=False)
        for group in peer.param_groups:
            group["lr"] = rate * optimizer.rate(group["name"])
        peer.step()
    for name, leaf in leaves.items():
        made[name] = leaf.detach()
        made.update({f"{kind}.{name}": peer.state[leaf][kind] for kind in ("exp_avg", "exp_avg_sq")})
    return made


def ours(optimizer: AdamW, on: str, dtype: torch.dtype, start: Arrays, grads: list[Arrays]) -> Arrays:
    kind = str(dtype).removeprefix("torch.")
    where = backend(on)
    program = where.program(optimizer.graph({n: (s, kind) for n, s in SHAPES.items()}, exact=where.exact))
    live: dict[str, Any] = {name: array.to(dtype).clone() for name, array in start.items()}
    for name, shape in SHAPES.items():
        live.update({f"{moment}.{name}": torch.zeros(shape, dtype=dtype) for moment in ("exp_avg", "exp_avg_sq")})
    made: Arrays = {}
    for step, (rate, grad) in enumerate(zip(RATES, grads, strict=True)):
        fresh = {f"grad.{name}": array.to(dtype) for name, array in grad.items()}
        rates = optimizer.learning_rates(rate, {name: (shape, kind) for name, shape in SHAPES.items()})
        live = program({**live, **fresh, **rates, "step": step + 1})
        made[f"norm{step}"] = live.pop("grad_norm")
    return {**made, **live}


CHOICES = {
    "plain": AdamW(clip=0.0),
    "decay": AdamW(clip=0.0, weight_decay=0.1, beta2=0.95),
    "clip": AdamW(clip=0.5, weight_decay=0.1),
    "rates": AdamW(clip=0.5, weight_decay=0.1, rates=(("w", 16.0), ("v", 0.1))),
    "clip not reached": AdamW(clip=1e3, eps=1e-6),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_exact_is_torchs_bits(choice):
    start, grads = draw()
    expected = torchs(CHOICES[choice], torch.float32, start, grads)
    for name, array in ours(CHOICES[choice], "torch_reference", torch.float32, start, grads).items():
        assert torch.equal(array, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("on", ["cpu_native", "cuda_triton"])
def test_fast_is_within_the_bound(on, choice, dtype):
    start, grads = draw()
    start, *grads = [{name: array.to(dtype) for name, array in arrays.items()} for arrays in (start, *grads)]
    plain = torchs(CHOICES[choice], dtype, start, grads)
    expected = torchs(CHOICES[choice], torch.float64, start, grads)
    found = ours(CHOICES[choice], on, dtype, start, grads)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert_close(name, array, expected[name], plain[name])


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on", ["cpu_native", "cuda_triton"])
def test_one_update(on, dtype, scale):
    """The op by itself, with moments of a run under way, in place, with and without a coefficient."""
    generator = torch.Generator().manual_seed(9)
    arrays = {name: torch.randn(37, generator=generator).to(dtype) for name in ("p", "g", "m")}
    arrays["v"] = torch.rand(37, generator=generator).to(dtype)
    if scale is not None:
        arrays["s"] = torch.tensor(scale)
    attrs = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}

    def run(rules: Any, kind: torch.dtype | None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        graph = Graph()
        bound = {n: (a.clone() if kind is None else a.to(kind)) for n, a in arrays.items()}
        made = {n: graph.input(n, tuple(a.shape), str(a.dtype).removeprefix("torch.")) for n, a in bound.items()}
        lr, step = graph.input("lr", (), "float32"), graph.input("step", (), "int64")
        new = adamw_update(made["p"], made["g"], made["m"], made["v"], lr, step, made.get("s"), **attrs)
        for name, tensor in zip("pmv", new, strict=True):
            graph.output(name, tensor)
        return Program(graph, rules)({**bound, "lr": 1e-2, "step": 5}), bound

    expected, plain = run(ATEN, torch.float64)[0], run(ATEN, None)[0]
    found, bound = run(backend(on).rules, None)
    assert torch.equal(bound["g"], arrays["g"])
    for name, array in found.items():
        assert array.data_ptr() == bound[name].data_ptr(), f"{name} was not updated in place"
        assert_close(name, array, expected[name], plain[name])
