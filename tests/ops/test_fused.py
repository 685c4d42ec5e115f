"""A backward op defined by its forward's decomposition gives torch.autograd's bits, waiting cotangent and all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers.activations import ACT2FN

from smedjan.backends.torch_reference import RULES
from smedjan.graph.grad import grad
from smedjan.graph.node import Graph
from smedjan.graph.op import OPS
from smedjan.graph.program import Program
from smedjan.graph.rewrite import BACKWARD_OF, decompose
from smedjan.ops import flash  # noqa: F401  (one of its ops is listed)
from smedjan.ops.activation import gelu_new, gelu_new_bwd, relu2, relu2_bwd
from smedjan.ops.attention import attention, attention_bwd
from smedjan.ops.glu import glu, glu_bwd
from smedjan.ops.lora import lora_linear, lora_linear_bwd, lora_linear_group, lora_linear_group_bwd
from smedjan.ops.loss import linear_cross_entropy, linear_kl, linear_log_probs, linear_log_probs_bwd
from smedjan.ops.norm import layer_norm, layer_norm_bwd, rms_norm, rms_norm_bwd
from smedjan.ops.rope import qk_norm_rope, qk_norm_rope_bwd, rope, rope_bwd
from tests.conftest import assert_bits

NEEDS = [(True, True), (True, False), (False, True)]
ACTIVATIONS = [(gelu_new, gelu_new_bwd), (relu2, relu2_bwd)]


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
        "qk_norm_rope_bwd",
        "glu_bwd",
        "attention_bwd",
        "flash_attention_bwd",
        "lora_linear_bwd",
        "gelu_new_bwd",
        "relu2_bwd",
        "lora_linear_group_bwd",
        "linear_log_probs_bwd",
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


@pytest.mark.parametrize("waits", [False, True], ids=["", "waiting"])
def test_layer_norm_bwd(waits):
    """The composed form is the one that is decomposed."""
    x, w, dy = normal(2, 3, 9), normal(9), normal(2, 3, 9).flip(1)
    acc = normal(2, 3, 9).flip(2) if waits else None
    mean, rstd = (torch.full((2, 3), float("nan")) for _ in range(2))  # the decomposition recomputes them
    attrs = {"eps": 1e-5, "composed": True}
    ours = run(layer_norm_bwd, (x, w, None, mean, rstd, dy, acc), needs=(True, True, False), **attrs)
    theirs = list(autograd(layer_norm, (x, w, None), [0, 1], dy, **attrs))
    if waits:
        theirs[0] = acc + theirs[0]
    assert_same(ours, theirs)


@pytest.mark.parametrize("needs", NEEDS)
def test_glu_bwd(needs):
    gate, up, dy = normal(3, 7), normal(3, 7) * 2, normal(7, 3).t().contiguous()
    ours = run(glu_bwd, (gate, up, dy), needs=needs, act="silu")
    assert_same(ours, autograd(glu, (gate, up), [n for n in (0, 1) if needs[n]], dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("forward", "backward"), [(gelu_new, gelu_new_bwd), (relu2, relu2_bwd)], ids=lambda op: op.name
)
def test_activations_of_several_operations(forward, backward, dtype):
    x, dy = normal(3, 7).to(dtype), normal(7, 3).t().contiguous().to(dtype)
    assert_same(run(backward, (dy, x)), autograd(forward, (x,), [0], dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["gelu_new", "relu2"])
def test_they_are_transformers_to_the_bit(act, dtype):
    x = normal(3, 7).to(dtype)
    (y,) = run(OPS[act], (x,))
    assert_bits(y, ACT2FN[act](x), act)


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


LABELS = torch.tensor([3, -100, 6, 0, -100])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", NEEDS)
def test_linear_log_probs_bwd(needs, dtype):
    x, w, dy = normal(5, 8).to(dtype), normal(7, 8).to(dtype), normal(5)
    attrs = {"scaling": 0.7, "divisor": 1.3, "cap": 2.0}
    lse = torch.full((5, 2), float("nan"))  # the decomposition recomputes it
    ours = run(linear_log_probs_bwd, (dy, x, w, LABELS, lse), needs=needs, **attrs)
    theirs = autograd(linear_log_probs, (x, w, LABELS), [n for n in (0, 1) if needs[n]], dy, **attrs)
    assert_same(ours, theirs)


def plain_head(seed: int) -> tuple[torch.Tensor, ...]:
    """x, weight, z of five trained and untrained rows, float64"""
    x, w = normal(5, 8 + seed).double(), normal(7, 8 + seed).double()
    return x, w, x @ w.T


def test_z_loss_is_palms():
    """loss + z_loss sum of lse^2 of trained rows (Chowdhery et al. 2022); nothing of it is made where it is zero."""
    x, w, z = plain_head(0)
    n, trained = torch.tensor(3.0, dtype=torch.float64), LABELS != -100
    base = torch.nn.functional.cross_entropy(z, LABELS, reduction="sum")
    for z_loss in (0.0, 0.3):
        (made,) = run(linear_cross_entropy, (x.float(), w.float(), LABELS, n.float()), z_loss=z_loss)
        expected = (base + z_loss * z.logsumexp(-1)[trained].square().sum()) / n
        torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=0)
    graph = Graph()
    inputs = [graph.input(*given) for given in (("x", (5, 8), "float32"), ("w", (7, 8), "float32"))]
    inputs += [graph.input("labels", (5,), "int64"), graph.input("n", (), "float32")]
    graph.output("y", linear_cross_entropy(*inputs, z_loss=0.0))
    names = [node.op.name for node in decompose(graph, RULES.has).live_nodes()]
    assert names == ["input", "input", "input", "input", "linear", "log_softmax", "nll_loss", "divide_by"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.1, 0.45])
def test_label_smoothing_is_torchs_to_the_bit(smoothing, dtype):
    """Of transformers' loss (fixed_cross_entropy: reduction "sum", over num_items), value and gradients."""
    x, w, n = normal(5, 8).to(dtype), normal(7, 8).to(dtype), torch.tensor(3.0)
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    logits = torch.nn.functional.linear(*leaves).float()
    loss = torch.nn.functional.cross_entropy(logits, LABELS, reduction="sum", label_smoothing=smoothing) / n
    graph = Graph()
    name = str(dtype).removeprefix("torch.")
    inputs = [graph.input("x", (5, 8), name), graph.input("w", (7, 8), name)]
    inputs += [graph.input("labels", (5,), "int64"), graph.input("n", (), "float32")]
    graph.output("loss", linear_cross_entropy(*inputs, smoothing=smoothing))
    graph = decompose(graph, RULES.has)
    for key, gradient in zip("xw", grad(graph.outputs["loss"], [graph.inputs[k] for k in "xw"]), strict=True):
        graph.output(f"d{key}", gradient)
    made = Program(graph, RULES)({"x": x, "w": w, "labels": LABELS, "n": n})
    for key, theirs in zip(("loss", "dx", "dw"), (loss.detach(), *torch.autograd.grad(loss, leaves)), strict=True):
        assert_bits(made[key], theirs, key)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_linear_kl_is_torchs(direction):
    (x, w, z), (t, u, teacher) = plain_head(0), plain_head(1)
    log_q, log_p = (value[LABELS != -100].div(2.0).log_softmax(-1) for value in (z, teacher))
    of, beside = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    expected = torch.nn.functional.kl_div(beside, of, reduction="sum", log_target=True) * 4.0 / 3.0
    arrays = [array.float() for array in (x, w, t, u)]
    (made,) = run(linear_kl, (*arrays, LABELS, torch.tensor(3.0)), direction=direction, temperature=2.0)
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=0)


def group(adapted: str, biased: bool, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict]:
    """x [2, 5, 13] and a group's tensors, whose members have an adapter where `adapted` has an "a"."""
    widths = (7, 4, 9)[: len(adapted)]
    weights = [normal(width, 13).to(dtype) for width in widths]
    biases = [normal(width).to(dtype) for width in widths] if biased else []
    of_adapted = [width for width, letter in zip(widths, adapted, strict=True) if letter == "a"]
    adapters = [normal(3, 13) * (1 + index) for index in range(len(of_adapted))]
    expanding = [normal(width, 3) for width in of_adapted]
    attrs = {"adapted": tuple(letter == "a" for letter in adapted), "biased": biased, "scaling": 1.5}
    return [normal(2, 5, 13).to(dtype), *weights, *biases, *adapters, *expanding], attrs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("waits", [False, True], ids=["", "waiting"])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("adapted", ["a", "aa", "a-a"])
def test_lora_linear_group_bwd(adapted, needs, waits, dtype):
    arrays, attrs = group(adapted, False, dtype)
    members, adapters = len(adapted), 2 * adapted.count("a")
    dy = normal(2, 5, sum(w.shape[0] for w in arrays[1 : 1 + members])).to(dtype)
    acc = normal(2, 5, 13).flip(0).to(dtype) if waits else None
    low = torch.full((2, 5, 3 * adapted.count("a")), float("nan"))  # the decomposition recomputes it
    given = {name: attrs[name] for name in ("adapted", "scaling")}
    ours = run(lora_linear_group_bwd, (dy, arrays[0], low, acc, *arrays[1:]), needs=needs, **given)
    wrt = [0] * needs[0] + list(range(1 + members, 1 + members + adapters)) * needs[1]
    theirs = list(autograd(lora_linear_group, arrays, wrt, dy, **attrs))
    if needs[0]:
        theirs[0] = dx_of_members(arrays, dy, acc, adapted)
    assert_same(ours, theirs)


def dx_of_members(arrays, dy, acc, adapted: str) -> torch.Tensor:
    """acc + each member's dx, the last member's first; a member's base and adapter are one sum before they meet any"""
    x, *tensors = arrays
    weights, rest = tensors[: len(adapted)], tensors[len(adapted) :]
    pairs = list(zip(rest[: len(rest) // 2], rest[len(rest) // 2 :], strict=True))
    total = None
    for weight, letter, piece in zip(
        weights[::-1], adapted[::-1], dy.split([w.shape[0] for w in weights], -1)[::-1], strict=True
    ):
        if letter == "a":
            (dx,) = autograd(lora_linear, (x, weight, None, *pairs.pop()), [0], piece, scaling=1.5)
        else:
            leaf = x.clone().requires_grad_()
            (dx,) = torch.autograd.grad(torch.nn.functional.linear(leaf, weight), leaf, piece)
        total = dx if total is None else total + dx
    return total if acc is None else acc + total


@pytest.mark.parametrize("adapted", ["a", "a-a"])
def test_lora_linear_group_differentiates_weights_and_biases_too(adapted):
    """One gradient at a time: dx, each dW, each bias's, each dA and dB; dx sums its members in another order."""
    arrays, attrs = group(adapted, True, torch.float32)
    dy = normal(2, 5, sum(w.shape[0] for w in arrays[1 : 1 + len(adapted)]))
    for index in range(len(arrays)):
        graph = Graph()
        inputs = [graph.input(f"i{n}", tuple(array.shape), "float32") for n, array in enumerate(arrays)]
        seed = graph.input("dy", tuple(dy.shape), "float32")
        y = lora_linear_group(*inputs, **attrs)
        (made,) = grad(y, [inputs[index]], seeds={y: seed})
        graph.output("d", made)
        values = Program(decompose(graph, RULES.has), RULES)({f"i{n}": a for n, a in enumerate(arrays)} | {"dy": dy})
        (expected,) = autograd(lora_linear_group, arrays, [index], dy, **attrs)
        torch.testing.assert_close(values["d"], expected, rtol=0, atol=1e-5)


def test_rope_bwd():
    x, dy, angles = normal(2, 3, 5, 6), normal(2, 3, 5, 6).flip(0), normal(1, 1, 5, 3).repeat(1, 1, 1, 2)
    ours = run(rope_bwd, (dy, angles.cos(), angles.sin()))
    assert_same(ours, autograd(rope, (x, angles.cos(), angles.sin()), [0], dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("needs", [(True,) * 4, (True, False, False, True), (True, True, False, False)])
@pytest.mark.parametrize("dim", [4, 6])
def test_qk_norm_rope_bwd(dim, needs, interleaved, dtype):
    q, k, dq, dk = (normal(2, heads, 5, 6).flip(number).to(dtype) for number, heads in enumerate((4, 2, 4, 2)))
    weights = [normal(6).to(dtype), normal(6).flip(0).to(dtype)]
    cos, sin = (normal(1, 1, 5, dim).to(dtype), normal(1, 1, 5, dim).flip(2).to(dtype))
    attrs = {"eps": 1e-5, "weight_cast": "after", "offset": 1.0, "interleaved": interleaved, "upcast": ""}
    ours = run(qk_norm_rope_bwd, (dq, dk, q, k, *weights, cos, sin), needs=needs, **attrs)
    leaves = [x.clone().requires_grad_() for x in (q, k, *weights)]
    made = run(qk_norm_rope, (*leaves, cos, sin), **attrs)
    wrt = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    assert_same(ours, torch.autograd.grad(made, wrt, (dq, dk)))


def test_qk_norm_rope_bwd_without_norms():
    dq, dk, angles = normal(2, 3, 5, 6), normal(2, 1, 5, 6), normal(1, 1, 5, 3).repeat(1, 1, 1, 2)
    tables = (angles.cos(), angles.sin())
    attrs = {"eps": 0.0, "weight_cast": "before", "offset": 0.0, "interleaved": False, "upcast": ""}
    needs = (True, True, False, False)
    ours = run(qk_norm_rope_bwd, (dq, dk, None, None, None, None, *tables), needs=needs, **attrs)
    for mine, dy in zip(ours, (dq, dk), strict=True):
        assert_same((mine,), run(rope_bwd, (dy, *tables)))


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
