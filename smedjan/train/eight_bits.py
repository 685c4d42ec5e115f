"""What products of 8 bits cost each linear layer: measured before a run's first step, and shown.

The error of a layer is |y - x W^T| / |x W^T|, Euclidean norms over all its outputs, the product beside it in float32. A
run measures it on the activations of its first batch, a dry run on inputs of a unit normal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from smedjan.backends.base import Array
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.raw import RawTensor
from smedjan.data.collate import Batch
from smedjan.graph.node import Graph, Node
from smedjan.graph.tensor import Tensor
from smedjan.runtime.session import Session

ROWS = 256
"""Normal inputs of a layer in a dry run."""

Errors = dict[str, float]
"""By the layer's name."""

Layers = dict[Node, dict[str, str]]
"""Nodes whose products are of 8 bits, {layer: weight} of each."""

Measure = Callable[[Array, str], float]
"""(x, weight's name) -> the layer's error."""


@dataclass(frozen=True, kw_only=True)
class EightBits:
    """One way to take products of 8 bits.

    key      of the flag `train.KEY`, of a run's events and of plans
    numbers  what the products are of, in words
    layers   (training graph, field=) -> Layers; none is an error of `field`
    measure  (session, field=) -> Measure
    """

    key: str
    numbers: str
    layers: Callable[..., Layers]
    measure: Callable[..., Measure]

    def of_batch(self, session: Session, batch: Batch, wrt: Sequence[str], *, field: str) -> Errors:
        """Every layer's error on what reaches it in a forward and backward pass over `batch`, made for this."""
        measure, found, readers = self.measure(session, field=field), Errors(), dict[Tensor, dict[str, str]]()

        def observe(node: Node, outs: tuple[Array | None, ...]) -> None:
            if not readers:
                for reader, weights in self.layers(node.graph, field=field).items():
                    x = reader.inputs[0]
                    assert x is not None
                    readers[x] = readers.get(x, {}) | weights
            for tensor, x in zip(node.outputs, outs, strict=True):
                for layer, weight in readers.get(tensor, {}).items():
                    found[layer] = measure(x, weight)

        session.micro(batch, wrt, num_items=1.0, observe=observe)
        return found

    def of_normal(self, session: Session, graph: Graph, *, field: str) -> Errors:
        """Every layer's error on ROWS inputs of a unit normal, one draw for all layers of a width."""
        measure, found, inputs = self.measure(session, field=field), Errors(), dict[int, Array]()
        for weights in self.layers(graph, field=field).values():
            for layer, weight in weights.items():
                width = session.specs()[weight][0][1]
                if width not in inputs:
                    drawn = np.random.default_rng(0).standard_normal((ROWS, width), dtype=np.float32)
                    inputs[width] = session.backend.from_raw(convert(RawTensor.of(drawn), session.dtype))
                found[layer] = measure(inputs[width], weight)
        return found

    def line(self, found: Mapping[str, Any], *, on: str) -> str:
        """A `summary` in words; `on` says what it was measured on."""
        return (
            f"{self.key.replace('_', '-')}: {found['layers']} linear layers in {self.numbers}; relative error on {on}: "
            f"median {found['median']:.2%}, worst {found['worst']:.2%} ({found['worst_layer']})"
        )


def summary(errors: Errors) -> dict[str, Any]:
    """How many layers there are in 8 bits, the middle error and the worst: what a run says before its first step."""
    worst = max(errors, key=errors.__getitem__)
    middle = median(errors.values())
    return {"layers": len(errors), "median": middle, "worst": errors[worst], "worst_layer": worst}


def weights_of(node: Node) -> dict[str, str]:
    """{layer: weight} of a node's matrices that are weights of the model itself, not adapters or codes."""
    tensors = [each for each in node.inputs[1:] if each is not None and each.ndim == 2 and each.dtype != "int8"]
    names = [name for each in tensors if ".lora_" not in (name := each.node.attrs["name"])]
    return {name.removesuffix(".weight"): name for name in names}
