"""One graph on two backends: torch_reference (decomposed, then differentiated) and mlx_metal (as Session builds it)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from smedjan.backends.mlx_metal import backend as mlx_backend
from smedjan.backends.torch_reference import backend as torch_backend
from smedjan.graph.grad import grad
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import cse, decompose, prune
from smedjan.graph.tensor import Tensor

MLX, TORCH = mlx_backend(), torch_backend()
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
"""Half the distance of 1 to the next number."""

Outputs = dict[str, torch.Tensor]


@dataclass
class Case:
    """`build(inputs by name) -> output(s)`. Arrays named in `wrt` get gradients of sum(output * seed)."""

    build: Callable[[dict[str, Tensor]], Any]
    arrays: dict[str, torch.Tensor]
    wrt: tuple[str, ...] = ()
    depth: int = 1
    fixed: frozenset[str] = field(default_factory=frozenset)

    def dtype_of(self, name: str, dtype: str) -> str:
        array = self.arrays[name]
        if not array.is_floating_point():
            return {
                torch.int64: "int64",
                torch.bool: "bool",
                torch.uint8: "uint8",
                torch.int8: "int8",
                torch.uint32: "uint32",
            }[array.dtype]
        return "float32" if name in self.fixed else dtype

    def program(self, backend: Any, dtype: str) -> Program:
        graph = Graph()
        inputs = {
            name: graph.input(name, tuple(array.shape), self.dtype_of(name, dtype))
            for name, array in self.arrays.items()
            if not name.startswith("seed")
        }
        made = self.build(inputs)
        for index, tensor in enumerate(made if isinstance(made, tuple) else (made,)):
            graph.output(f"y{index}", tensor)
        if backend.exact:
            graph = decompose(graph, backend.rules.has)
        if self.wrt:
            y = graph.outputs["y0"]
            seed = graph.input("seed", y.shape, y.dtype)
            found = grad(y, [graph.inputs[name] for name in self.wrt], seeds={y: seed})
            for name, gradient in zip(self.wrt, found, strict=True):
                assert gradient is not None
                graph.output(f"d{name}", gradient)
        if not backend.exact:
            graph = decompose(graph, backend.rules.has)
        return backend.program(cse(prune(graph)))

    def run(self, backend: Any, dtype: str, *, values_of: str) -> Outputs:
        """Outputs in float64. Inputs are rounded to `values_of` first, whatever dtype the program has."""
        program = self.program(backend, dtype)
        made = program(self.bind(backend, program, values_of))
        return {name: to_torch(backend, array).double() for name, array in made.items()}

    def bind(self, backend: Any, program: Program, values_of: str) -> dict[str, Any]:
        arrays = dict(self.arrays)
        if self.wrt:
            shape = program.graph.inputs["seed"].shape
            arrays["seed"] = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        bound: dict[str, Any] = {}
        for name, tensor in program.graph.inputs.items():
            array = arrays[name]
            if array.is_floating_point():
                if name not in self.fixed:
                    array = array.to(getattr(torch, values_of))
                array = array.to(getattr(torch, tensor.dtype))
            bound[name] = from_torch(backend, array)
        return bound


def from_torch(backend: Any, array: torch.Tensor) -> Any:
    return backend.from_raw(TORCH.to_raw(array.clone()))


def to_torch(backend: Any, array: Any) -> torch.Tensor:
    return TORCH.from_raw(backend.to_raw(array))


def bound(reference: torch.Tensor, plain: torch.Tensor, dtype: str, depth: int) -> float:
    """bfloat16: 2 e_torch + 2 u max|ref|, e_torch the error of the plain bfloat16 computation against float32.

    float32 has no wider oracle here (casts to float32 are nodes): two orders of a sum of `depth` terms, each off by
    some sqrt(depth) u, after a handful of roundings.
    """
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    if dtype == "float32":
        return (8 + 4 * depth**0.5) * UNIT[dtype] * largest
    return 2 * float((plain - reference).abs().max()) + 2 * UNIT[dtype] * largest


def check(case: Case, dtype: str) -> None:
    """Every output and gradient of MLX within its bound of torch_reference."""
    reference = case.run(TORCH, "float32", values_of=dtype)
    plain = case.run(TORCH, dtype, values_of=dtype)
    found = case.run(MLX, dtype, values_of=dtype)
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        assert found[name].shape == expected.shape, name
        assert torch.isfinite(found[name]).all(), name
        if not expected.numel():
            continue
        error = float((found[name] - expected).abs().max())
        assert error <= bound(expected, plain[name], dtype, case.depth), f"{name}: {error}"
