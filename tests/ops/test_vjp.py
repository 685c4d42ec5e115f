"""Every op's VJP gives torch.autograd's bits over the same lowering, decomposed as the exact backend decomposes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from smedjan.graph.grad import grad
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import decompose
from smedjan.graph.tensor import Tensor
from smedjan.ops import activation as act
from smedjan.ops import attention as att
from smedjan.ops import elementwise as ew
from smedjan.ops.embedding import embedding, take_rows
from smedjan.ops.glu import glu
from smedjan.ops.linear import conv1d, linear, matmul, transpose_last
from smedjan.ops.loss import (
    linear_cross_entropy,
    linear_kl,
    linear_log_probs,
    log_softmax,
    nll_loss,
    pick,
    smooth_loss,
    sum_trained,
)
from smedjan.ops.norm import layer_norm, mean_last, rms_norm
from smedjan.ops.random import dropout
from smedjan.ops.rope import rope, rotate_half
from smedjan.ops.shape import concat, slice_last, split
from smedjan.runtime.select import backend
from tests.conftest import assert_bits

RULES = backend("torch_reference").rules
HEADS, GROUPS = (2, 6, 5, 8), (2, 2, 5, 8)
KEY = torch.tensor([1, 2, 3, 4])
LABELS = torch.tensor([1, -100, 6, 0])
Case = tuple[Callable[..., Tensor], tuple]


def _attend(**attrs):
    return lambda q, k, v, m=None: att.attention(q, k, v, m, scale=0.3, **attrs)


def _pieces(x):
    first, _unread, last = split(x, sizes=(2, 1, 2), dim=-1)
    return concat(last, first, dim=0)


MASK = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
CASES: dict[str, Case] = {
    "identity": (ew.identity, ((3, 4),)),
    "add": (ew.add, ((3, 4), (4,))),
    "mul": (ew.mul, ((3, 4), (3, 1))),
    "scale": (lambda x: ew.scale(x, factor=0.3), ((3, 4),)),
    "divide_by": (ew.divide_by, ((3, 4), torch.tensor(7.0))),
    "add_scalar": (lambda x: ew.add_scalar(x, value=0.5), ((3, 4),)),
    "square": (ew.square, ((3, 4),)),
    "rsqrt": (lambda x: ew.rsqrt(ew.add_scalar(ew.square(x), value=0.5)), ((3, 4),)),
    "sub": (ew.sub, ((3, 4), (3, 1))),
    "divide": (lambda x: ew.divide(x, divisor=0.3), ((3, 4),)),
    "power": (lambda x: ew.power(x, exponent=3.0), ((3, 4),)),
    "silu": (act.silu, ((3, 4),)),
    "tanh": (act.tanh, ((3, 4),)),
    "relu": (act.relu, ((3, 4),)),
    "gelu": (act.gelu, ((3, 4),)),
    "gelu tanh": (lambda x: act.gelu(x, approximate="tanh"), ((3, 4),)),
    "gelu_new": (act.gelu_new, ((3, 4),)),
    "softcap": (lambda x: act.softcap(x, 2.0), ((3, 4),)),
    "conv1d": (conv1d, ((2, 3, 8), (8, 6), (6,))),
    "slices": (lambda x: ew.add(slice_last(x, start=0, stop=3), slice_last(x, start=1, stop=4)), ((2, 5),)),
    "split": (_pieces, ((2, 5),)),
    "swap_heads": (att.swap_heads, (HEADS,)),
    "layer_norm": (lambda x, w, b: layer_norm(x, w, b, eps=1e-5), ((2, 3, 8), (8,), (8,))),
    "layer_norm composed": (lambda x, w: layer_norm(x, w, None, eps=1e-5, composed=True), ((2, 3, 8), (8,))),
    "reshape": (lambda x: ew.reshape(x, shape=(4, 3)), ((3, 4),)),
    "cast": (lambda x: ew.cast(ew.cast(x, "bfloat16"), "float32"), ((3, 4),)),
    "linear": (linear, ((2, 3, 8), (6, 8), (6,))),
    "matmul": (matmul, ((2, 3, 4, 5), (2, 3, 5, 6))),
    "transpose_last": (transpose_last, ((2, 3, 4),)),
    "split_heads": (lambda x: att.split_heads(x, heads=2), ((2, 3, 8),)),
    "merge_heads": (att.merge_heads, (HEADS,)),
    "repeat_kv": (lambda x: att.repeat_kv(x, times=3), (GROUPS,)),
    "contiguous": (att.contiguous, (HEADS,)),
    "softmax": (att.softmax, ((3, 9),)),
    "sdpa": (_attend(causal=True), (HEADS, HEADS, HEADS)),
    "sdpa masked, grouped": (_attend(causal=False), (HEADS, GROUPS, GROUPS, MASK)),
    "eager": (_attend(causal=False, implementation="eager"), (HEADS, HEADS, HEADS, MASK)),
    "eager grouped": (_attend(causal=False, implementation="eager"), (HEADS, GROUPS, GROUPS, MASK)),
    "mean_last": (mean_last, ((3, 8),)),
    "rms_norm": (lambda x, w: rms_norm(x, w, eps=1e-5), ((2, 3, 8), (8,))),
    "rms_norm after": (lambda x, w: rms_norm(x, w, eps=1e-5, weight_cast="after"), ((2, 3, 8), (8,))),
    "glu": (glu, ((3, 8), (3, 8))),
    "rotate_half": (rotate_half, (HEADS,)),
    "rope interleaved": (
        lambda x, c, s: rope(x, c, s, interleaved=True),
        (HEADS, torch.rand(1, 1, 5, 8), torch.rand(1, 1, 5, 8)),
    ),
    "rope partial": (rope, (HEADS, torch.rand(1, 1, 5, 4), torch.rand(1, 1, 5, 4))),
    "eager capped": (_attend(causal=False, implementation="eager", cap=2.0), (HEADS, GROUPS, GROUPS, MASK)),
    "rms_norm offset": (lambda x, w: rms_norm(x, w, eps=1e-5, weight_cast="after", offset=1.0), ((2, 3, 8), (8,))),
    "rope": (rope, (HEADS, torch.rand(1, 1, 5, 8), torch.rand(1, 1, 5, 8))),
    "embedding": (lambda w, i: embedding(i, w), ((7, 8), torch.tensor([[1, 6, 1], [0, 2, 6]]))),
    "take_rows": (take_rows, ((7, 8), torch.tensor([5, 0, 3]))),
    "log_softmax": (log_softmax, ((4, 7),)),
    "nll_loss": (nll_loss, ((4, 7), LABELS)),
    "linear_cross_entropy": (
        lambda x, w, y, n: linear_cross_entropy(x, w, y, n, grads="xw"),
        ((4, 8), (7, 8), LABELS, torch.tensor(3.0)),
    ),
    "pick": (pick, ((4, 7), LABELS)),
    "sum_trained": (sum_trained, ((4, 7), LABELS)),
    "smooth_loss": (smooth_loss, ((4, 7), LABELS)),
    "sum_trained of numbers": (sum_trained, ((4,), LABELS)),
    "linear_cross_entropy z-loss": (
        lambda x, w, y, n: linear_cross_entropy(x, w, y, n, grads="xw", cap=2.0, z_loss=0.1, smoothing=0.2),
        ((4, 8), (7, 8), LABELS, torch.tensor(3.0)),
    ),
    "linear_kl": (
        lambda x, w, t, u, y, n: linear_kl(x, w, t, u, y, n, grads="xw", temperature=2.0),
        ((4, 8), (7, 8), torch.rand(4, 3), torch.rand(7, 3), LABELS, torch.tensor(3.0)),
    ),
    "linear_kl reverse": (
        lambda x, w, t, u, y, n: linear_kl(x, w, t, u, y, n, grads="xw", direction="reverse"),
        ((4, 8), (7, 8), torch.rand(4, 3), torch.rand(7, 3), LABELS, torch.tensor(3.0)),
    ),
    "linear_log_probs": (linear_log_probs, ((4, 8), (7, 8), LABELS)),
    "dropout": (lambda x, key: dropout(x, key, p=0.4, site=2), ((3, 8), KEY)),
}


@pytest.mark.parametrize("name", CASES)
def test_vjp_is_autograds(name):
    build, arguments = CASES[name]
    torch.manual_seed(0)
    arrays = {f"i{n}": a if isinstance(a, torch.Tensor) else torch.randn(a) for n, a in enumerate(arguments)}
    wrt = [f"i{n}" for n, a in enumerate(arguments) if not isinstance(a, torch.Tensor)]
    graph = Graph()
    for key, array in arrays.items():
        graph.input(key, tuple(array.shape), str(array.dtype).removeprefix("torch."))
    graph.output("y", build(*graph.inputs.values()))
    graph = decompose(graph, RULES.has)
    forward = Program(graph, RULES)
    y = graph.outputs["y"]
    seed = graph.input("dy", y.shape, y.dtype)
    for key, dx in zip(wrt, grad(y, [graph.inputs[key] for key in wrt], seeds={y: seed}), strict=True):
        assert dx is not None
        graph.output(f"d{key}", dx)
    dy = torch.randn(y.shape)
    ours = Program(graph, RULES)({**arrays, "dy": dy})
    leaves = {key: array.clone().requires_grad_() if key in wrt else array for key, array in arrays.items()}
    made = forward(leaves)["y"]
    made.backward(dy)
    assert_bits(ours["y"], made.detach(), "y")
    for key in wrt:
        assert_bits(ours[f"d{key}"], leaves[key].grad, f"d{key}")
