"""The blocks' linear layers in 8-bit floats (`--train.fp8`): for which runs, and what it costs each layer."""

from __future__ import annotations

from smedjan.backends.base import Backend
from smedjan.errors import ConfigError
from smedjan.graph.node import Graph
from smedjan.ops.fp8 import MULTIPLE, fp8_linear, fp8_linear_group
from smedjan.runtime.session import Session
from smedjan.train.eight_bits import EightBits, Layers, Measure, weights_of

DTYPE = "bfloat16"
"""Of the layers that can be had in 8 bits: the library's result."""


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


def layers(graph: Graph, *, field: str) -> Layers:
    found = {node: weights_of(node) for node in graph.nodes if node.op in (fp8_linear, fp8_linear_group)}
    if not found:
        raise ConfigError(
            f"no linear layer of the blocks has a weight [out, in] of multiples of {MULTIPLE}",
            field=field,
            remedy="leave it out",
        )
    return found


def measure(session: Session, *, field: str) -> Measure:
    of_arrays = session.backend.fp8_measure(field=field)
    return lambda x, weight: of_arrays(x, session.parameters[weight])


FP8 = EightBits(key="fp8", numbers="8-bit floats", layers=layers, measure=measure)
