"""Products that read MLX's own codes. On MLX's CPU build they are asked for here alone: its sums are not in bound."""

from __future__ import annotations

import pytest
import torch
from mlx_cases import affine_parts, normal
from mlx_pair import MLX, TORCH, from_torch, to_torch

from smedjan.backends.mlx_metal import quantized as rules
from smedjan.graph.grad import grad
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import cse, decompose, prune
from smedjan.ops.quantized import AFFINE_BITS, AFFINE_GROUPS, affine_linear
from tests.tolerances import UNIT_ROUNDOFF

ROWS, OUTS, WIDTH = 5, 24, 256


def program(backend, arrays, **held) -> Program:
    graph = Graph()
    ins = {name: graph.input(name, tuple(a.shape), str(a.dtype).removeprefix("torch.")) for name, a in arrays.items()}
    y = affine_linear(*(ins[name] for name in ("x", "c", "s", "z", "b")), **held)
    (dx,) = grad(y, [ins["x"]], seeds={y: ins["dy"]})
    graph.output("y", y)
    graph.output("dx", dx)
    return backend.program(cse(prune(decompose(graph, backend.rules.has))))


def lowerings(made: Program) -> set[tuple[str, str]]:
    return {(row["op"], row["lowering"]) for row in made.lowerings()}


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", AFFINE_GROUPS)
def test_products_of_codes(bits: int, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what any order of a sum of n products may be off by in float32: (n + 3) u sum |x| (|s| q + |z|); the
    weight, which is a product and a sum, has three roundings of its own."""
    monkeypatch.setattr(rules, "multiplies_codes", lambda node: True)
    codes, scales, biases = affine_parts(OUTS, WIDTH, bits, group_size)
    arrays = {"x": normal(ROWS, WIDTH), "c": codes, "s": scales, "z": biases, "b": normal(OUTS)}
    arrays["dy"] = normal(ROWS, OUTS)
    held = {"bits": bits, "group_size": group_size}
    made = program(MLX, arrays, **held)
    assert {("affine_linear", "mx.quantized_matmul"), ("affine_linear_dx", "mx.quantized_matmul")} <= lowerings(made)
    found = {name: to_torch(MLX, a) for name, a in made({n: from_torch(MLX, a) for n, a in arrays.items()}).items()}
    wide = {name: a.double() if a.is_floating_point() else a for name, a in arrays.items()}
    exact = program(TORCH, wide, **held)(wide)
    dequantize = TORCH.rules._rules["affine_dequantize"][0].run
    sizes = dequantize(codes, scales.double().abs(), biases.double().abs(), **held)
    u = UNIT_ROUNDOFF[torch.float32]
    most = {
        "y": (WIDTH + 4) * u * (wide["x"].abs() @ sizes.T + wide["b"].abs()),
        "dx": (OUTS + 3) * u * (wide["dy"].abs() @ sizes),
    }
    for name, bound in most.items():
        assert ((found[name].double() - exact[name]).abs() <= bound).all(), name


def test_the_plan_says_what_the_cpu_build_does() -> None:
    codes, scales, biases = affine_parts(OUTS, WIDTH, 4, 64)
    arrays = {"x": normal(ROWS, WIDTH), "c": codes, "s": scales, "z": biases, "b": normal(OUTS), "dy": normal(5, OUTS)}
    said = lowerings(program(MLX, arrays, bits=4, group_size=64))
    assert ("affine_dequantize", "mx.dequantize") in said
    assert not {op for op, _ in said} & {"affine_linear", "affine_linear_dx"}
