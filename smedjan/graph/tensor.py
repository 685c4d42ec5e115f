"""Symbolic tensors: a shape, a dtype and the node that makes them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smedjan.graph.node import Graph, Node

ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
FLOATS = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Spec:
    """What a shape rule returns: the shape (dims bound to integers) and dtype of one output."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        assert self.dtype in ITEMSIZE, f"unknown dtype {self.dtype!r}"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """Output `index` of `node`. Compared by identity: two equal computations are two tensors until CSE merges them."""

    spec: Spec
    node: Node
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def ndim(self) -> int:
        return len(self.spec.shape)

    @property
    def numel(self) -> int:
        return self.spec.numel

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def graph(self) -> Graph:
        return self.node.graph

    def like(self, *, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> Spec:
        """A spec with this tensor's shape and dtype, except where given: for shape rules."""
        return Spec(self.shape if shape is None else shape, dtype or self.dtype)

    def __repr__(self) -> str:
        return f"%{self.node.id}.{self.index}:{self.dtype}{list(self.shape)}"
