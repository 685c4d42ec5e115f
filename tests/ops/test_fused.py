"""A backward op defined by its forward's decomposition gives torch.autograd's bits, waiting cotangent and all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from smedjan.backends.torch_reference import RULES
from smedjan.graph.node import Graph
from smedjan.graph.op import OPS
from smedjan.graph.program import Program
from smedjan.graph.rewrite import BACKWARD_OF, decompose
from smedjan.ops.attention import attention, attention_bwd
from smedjan.ops.glu import glu, glu_bwd
from smedjan.ops.lora import lora_linear, lora_linear_bwd
from smedjan.ops.norm import rms_norm, rms_norm_bwd
from smedjan.ops.rope import rope, rope_bwd
from tests.conftest import assert_bits

NEEDS = [(True, True), (True, False), (False, True)]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def run(op, arrays: Sequence[torch.Tensor | None], **attrs) -> tuple[torch.Tensor, ...]:
    """The public outputs of `op`, decomposed as torch_reference decomposes it."""
    graph = Graph()
    names = {f"i{n}": array for n, array in enumerate(arrays) if array is not None}
    inputs = [
        None if array is None else graph.input(f"i{n}", tuple(array.shape), str(array.dtype).removeprefix("torch."))
        for n, array in enumerate(arrays)
    ]
    made = op(*inputs, **attrs)
    for index, tensor in enumerate(made if isinstance(made, tuple) else (made,)):
        graph.output(f"y{index}", tensor)
    graph = decompose(graph, RULES.has)
    assert op.name not in {node.op.name for node in graph.nodes}, f"{op.name} was not decomposed"
    return tuple(Program(graph, RULES)(names).values())


def autograd(op, arrays, wrt: Sequence[int], dy: torch.Tensor, **attrs) -> tuple[torch.Tensor, ...]:
    """torch.autograd's gradients of the decomposed forward, for the arrays at `wrt`."""
    leaves = [array.clone().requires_grad_() if n in wrt else array for n, array in enumerate(arrays)]
    (y,) = run(op, leaves, **attrs)
    return torch.autograd.grad(y, [leaves[n] for n in wrt], dy)


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_bits(mine, other, f"gradient {index}")


def test_these_are_all_of_them():
    assert set(BACKWARD_OF) == {
        "rms_norm_bwd",
        "layer_norm_bwd",
        "rope_bwd",
        "glu_bwd",
        "attention_bwd",
        "lora_linear_bwd",
    }
    assert set(BACKWARD_OF) <= set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("waits", [False, True], ids=["", "waiting"])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_rms_norm_bwd(when, needs, waits, dtype):
    x, w, dy, acc = (normal(*shape).to(dtype) for shape in ((2, 3, 9), (9,), (2, 3, 9), (1, 3, 9)))
    acc = acc.expand(2, 3, 9).contiguous() if waits else None
    attrs = {"eps": 1e-5, "weight_cast": when, "offset": 1.0 if when == "after" else 0.0}
    rstd = torch.full((2, 3), float("nan"))  # the decomposition recomputes it
    ours = run(rms_norm_bwd, (x, w, rstd, dy, acc), needs=needs, **attrs)
    theirs = list(autograd(rms_norm, (x, w), [n for n in (0, 1) if needs[n]], dy, **attrs))
    if waits and needs[0]:
        theirs[0] = acc + theirs[0]
    assert_same(ours, theirs)


@pytest.mark.parametrize("needs", NEEDS)
def test_glu_bwd(needs):
    gate, up, dy = normal(3, 7), normal(3, 7) * 2, normal(7, 3).t().contiguous()
    ours = run(glu_bwd, (gate, up, dy), needs=needs, act="silu")
    assert_same(ours, autograd(glu, (gate, up), [n for n in (0, 1) if needs[n]], dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("waits", [False, True], ids=["", "waiting"])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (True, False, False)])
def test_lora_linear_bwd(needs, waits, dtype):
    x, w, dy = normal(2, 5, 13).to(dtype), normal(7, 13).to(dtype), normal(2, 5, 7).to(dtype)
    a, b, acc = normal(3, 13), normal(7, 3), normal(2, 5, 13).flip(0).to(dtype) if waits else None
    low = torch.full((2, 5, 3), float("nan"))  # the decomposition recomputes it
    ours = run(lora_linear_bwd, (dy, x, w, a, b, low, acc), needs=needs, scaling=1.5)
    wrt = [n for n, need in zip((0, 3, 4), needs, strict=True) if need]
    theirs = list(autograd(lora_linear, (x, w, None, a, b), wrt, dy, scaling=1.5))
    if waits and needs[0]:
        theirs[0] = acc + theirs[0]
    assert_same(ours, theirs)


def test_rope_bwd():
    x, dy, angles = normal(2, 3, 5, 6), normal(2, 3, 5, 6).flip(0), normal(1, 1, 5, 3).repeat(1, 1, 1, 2)
    ours = run(rope_bwd, (dy, angles.cos(), angles.sin()))
    assert_same(ours, autograd(rope, (x, angles.cos(), angles.sin()), [0], dy))


@pytest.mark.parametrize("mask", ["causal", "mask"])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_bwd(implementation, groups, mask):
    q, dy = normal(2, 6, 5, 8), normal(2, 6, 5, 8).flip(1)
    k, v = normal(2, groups, 5, 8), normal(2, groups, 5, 8).flip(2)
    causal = mask == "causal" and implementation == "sdpa"
    seen = None if causal else torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    attrs = {"causal": causal, "scale": 0.3, "implementation": implementation, "cap": 0.0, "softmax_dtype": "float32"}
    if implementation == "eager":
        attrs["cap"] = 2.0
    y, lse = torch.full_like(q, float("nan")), torch.full((2, 6, 5), float("nan"))
    ours = run(attention_bwd, (dy, q, k, v, seen, y, lse), **attrs)
    assert_same(ours, autograd(attention, (q, k, v, seen), [0, 1, 2], dy, **attrs))
