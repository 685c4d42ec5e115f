"""Gradients and passes over graphs, each against torch.autograd or against the unchanged graph."""

from __future__ import annotations

import pytest
import torch

from smedjan.backends.torch_reference.table import RULES
from smedjan.errors import BackendError
from smedjan.graph.grad import grad
from smedjan.graph.liveness import check_donations, last_uses, peak_bytes
from smedjan.graph.lowering import RuleTable
from smedjan.graph.node import INPUT, Graph
from smedjan.graph.printer import line, lines
from smedjan.graph.program import Program
from smedjan.graph.rewrite import cse, prune
from smedjan.ops.activation import silu
from smedjan.ops.elementwise import add, mul, scale, square
from smedjan.ops.linear import linear
from smedjan.ops.optimizer import accumulate
from smedjan.ops.random import keep_mask
from smedjan.runtime.select import backend
from tests.conftest import assert_bits

backend("torch_reference")  # fills RULES


def _chain(factor: float = 2.0, size: int = 4) -> Graph:
    graph = Graph()
    x = graph.input("x", (size,), "float32")
    graph.output("y", square(silu(scale(x, factor=factor))))
    return graph


def test_a_fan_in_of_three_is_summed_as_autograd_sums_it():
    torch.manual_seed(0)
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    weights = [torch.randn(64, 64) for _ in range(3)]
    graph = Graph()
    leaf = graph.input("x", (5, 64), "float32")
    inputs = [graph.input(f"w{i}", (64, 64), "float32") for i in range(3)]
    seed = graph.input("dy", (5, 64), "float32")
    a, b, c = (linear(leaf, w) for w in inputs)
    made = add(mul(a, b), c)
    (dx,) = grad(made, [leaf], seeds={made: seed})
    graph.output("dx", dx)
    ours = Program(graph, RULES)({"x": x, "dy": dy, **{f"w{i}": w for i, w in enumerate(weights)}})["dx"]
    x.requires_grad_()
    a, b, c = (torch.nn.functional.linear(x, w) for w in weights)
    (a * b + c).backward(dy)
    assert_bits(ours, x.grad, "dx")


def test_what_nothing_depends_on_has_no_gradient():
    graph = Graph()
    x, y = graph.input("x", (3,), "float32"), graph.input("y", (3,), "float32")
    made = square(x)
    before = len(graph.nodes)
    assert grad(made, [y], seeds={made: x}) == [None]
    assert len(graph.nodes) == before


def test_cse_merges_pure_nodes_and_never_random_ones():
    graph = Graph()
    x, key = graph.input("x", (3,), "float32"), graph.input("key", (4,), "int64")
    masks = [keep_mask(key, shape=(3,), p=0.5, site=0) for _ in range(2)]
    graph.output("y", add(mul(square(x), masks[0]), mul(square(x), masks[1])))
    merged = cse(graph)
    names = [node.op.name for node in merged.nodes]
    assert names.count("square") == 1
    assert names.count("keep_mask") == 2
    arrays = {"x": torch.randn(3), "key": torch.tensor([1, 2, 3, 4])}
    assert_bits(Program(merged, RULES)(arrays)["y"], Program(graph, RULES)(arrays)["y"], "y")


def test_prune_drops_dead_nodes_and_keeps_inputs():
    graph = _chain()
    graph.input("unused", (2,), "float32")
    scale(graph.inputs["x"], factor=9.0)
    pruned = prune(graph)
    assert [node.op.name for node in pruned.nodes if node.op is not INPUT] == ["scale", "silu", "square"]
    assert list(pruned.inputs) == ["x", "unused"]


def test_liveness_frees_after_the_last_use():
    graph = _chain()
    nodes = [node for node in graph.live_nodes() if node.op is not INPUT]
    freed = last_uses(nodes, graph)
    assert [[t.node.op.name for t in tensors] for tensors in freed] == [[], ["scale"], ["silu"]]
    assert peak_bytes(nodes, graph) == 3 * 16  # the input and two values of four floats


def test_a_donated_buffer_read_later_is_refused():
    graph = Graph()
    total, gradient = graph.input("total", (3,), "float32"), graph.input("g", (3,), "float32")
    graph.output("sum", accumulate(total, gradient))
    check_donations(graph.nodes)
    graph.output("late", square(total))
    with pytest.raises(AssertionError, match="donated"):
        check_donations(graph.nodes)


def test_a_missing_lowering_names_op_and_backend():
    with pytest.raises(BackendError, match=r"backend empty has no lowering for the op 'scale'") as caught:
        Program(_chain(), RuleTable("empty"))
    assert caught.value.field == "scale"
    assert "\n" not in str(caught.value)


def test_the_plan_hash_is_stable_and_sensitive():
    first = Program(_chain(), RULES).plan_hash
    assert first == Program(_chain(), RULES).plan_hash
    assert first != Program(_chain(factor=2.5), RULES).plan_hash
    assert first != Program(_chain(size=5), RULES).plan_hash
    table = RuleTable("other", parent=RULES)
    assert first != Program(_chain(), table).plan_hash


def test_the_printer_folds_equal_layers():
    graph = Graph()
    x = graph.input("x", (2,), "float32")
    for layer in range(3):
        with graph.scope(f"layers.{layer}"):
            x = scale(x, factor=2.0)
    graph.output("y", x)
    assert line(graph.nodes[1]) == "%1.0:float32[2] = scale(x) factor=2.0   # layers.0"
    assert list(lines(graph)) == [
        "input  x: float32[2]",
        "%1.0:float32[2] = scale(x) factor=2.0   # layers.0",
        "...    2 more layers of the same form, 2 nodes",
        "output y: %3.0:float32[2]",
    ]
    assert len(list(lines(graph, fold=False))) == 5
