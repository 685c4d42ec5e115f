"""The blocks' linear layers in 8-bit floats (`--train.fp8`): for which runs, and what it costs each layer.

The error of a layer is |fp8(x) fp8(W)^T - x W^T| / |x W^T|, Euclidean norms over all its outputs, the product beside it
in float32. A run measures it on the activations of its first batch, a dry run on inputs of a unit normal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from smedjan.backends.base import Array, Backend
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.raw import RawTensor
from smedjan.data.collate import Batch
from smedjan.errors import ConfigError
from smedjan.graph.node import Graph, Node
from smedjan.graph.tensor import Tensor
from smedjan.ops.fp8 import MULTIPLE, fp8_linear, fp8_linear_group
from smedjan.runtime.session import Session

DTYPE = "bfloat16"
"""Of the layers that can be had in 8 bits: the library's result."""

ROWS = 256
"""Normal inputs of a layer in a dry run."""

Errors = dict[str, float]
"""By the layer's name."""


def check(backend: Backend, *, method: str | None, dtype: str, field: str) -> None:
    """ConfigError for `field` where a run of this kind has no 8-bit layers. `method` None: a forward pass alone."""
    if method is None:
        raise ConfigError("is for training", field=field, remedy="leave it out of a forward pass")
    if method != "full":
        raise ConfigError(f"is for full fine-tuning, not {method}", field=field, remedy="give --method full")
    backend.fp8_measure(field=field)
    if dtype != DTYPE:
        raise ConfigError(
            f"is for {DTYPE}, and this run computes in {dtype}", field=field, remedy=f"give --dtype {DTYPE}"
        )


def layers(graph: Graph, *, field: str) -> dict[Node, dict[str, str]]:
    """The nodes of a training graph whose products are of 8-bit floats, {layer: weight} of each; none is an error."""
    found = {node: _weights(node) for node in graph.nodes if node.op in (fp8_linear, fp8_linear_group)}
    if not found:
        raise ConfigError(
            f"no linear layer of the blocks has a weight [out, in] of multiples of {MULTIPLE}",
            field=field,
            remedy="leave it out",
        )
    return found


def _weights(node: Node) -> dict[str, str]:
    names = [each.node.attrs["name"] for each in node.inputs[1:] if each is not None and each.ndim == 2]
    return {name.removesuffix(".weight"): name for name in names}


def of_batch(session: Session, batch: Batch, wrt: Sequence[str], *, field: str) -> Errors:
    """Every layer's error on what reaches it in a forward and backward pass over `batch`, which is made for this."""
    measure, found, readers = session.backend.fp8_measure(field=field), Errors(), dict[Tensor, dict[str, str]]()

    def observe(node: Node, outs: tuple[Array | None, ...]) -> None:
        if not readers:
            for reader, weights in layers(node.graph, field=field).items():
                x = reader.inputs[0]
                assert x is not None
                readers[x] = readers.get(x, {}) | weights
        for tensor, x in zip(node.outputs, outs, strict=True):
            for layer, weight in readers.get(tensor, {}).items():
                found[layer] = measure(x, session.parameters[weight])

    session.micro(batch, wrt, num_items=1.0, observe=observe)
    return found


def of_normal(session: Session, graph: Graph, *, field: str) -> Errors:
    """Every layer's error on ROWS inputs of a unit normal, one draw for all layers of a width."""
    measure, found, inputs = session.backend.fp8_measure(field=field), Errors(), dict[int, Array]()
    for weights in layers(graph, field=field).values():
        for layer, weight in weights.items():
            width = session.specs()[weight][0][1]
            if width not in inputs:
                drawn = np.random.default_rng(0).standard_normal((ROWS, width), dtype=np.float32)
                inputs[width] = session.backend.from_raw(convert(RawTensor.of(drawn), DTYPE))
            found[layer] = measure(inputs[width], session.parameters[weight])
    return found


def summary(errors: Errors) -> dict[str, Any]:
    """How many layers there are in 8 bits, the middle error and the worst: what a run says before its first step."""
    worst = max(errors, key=errors.__getitem__)
    middle = median(errors.values())
    return {"layers": len(errors), "median": middle, "worst": errors[worst], "worst_layer": worst}


def line(found: Mapping[str, Any], *, on: str) -> str:
    """A `summary` in words; `on` says what it was measured on."""
    return (
        f"fp8: {found['layers']} linear layers in 8-bit floats; relative error on {on}: "
        f"median {found['median']:.2%}, worst {found['worst']:.2%} ({found['worst_layer']})"
    )
