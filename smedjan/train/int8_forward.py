"""The forward pass of LoRA's frozen base in 8-bit integers (`--train.int8-forward`): for which runs, the codes of the
weights, and what it costs each layer.

Gradients are those of the float layers at the activations of this forward pass (`ops/w8a8.py`).
"""

from __future__ import annotations

from smedjan.backends.base import Backend
from smedjan.checkpoint import int8
from smedjan.errors import ConfigError
from smedjan.graph.node import Graph
from smedjan.models.decoder_config import DecoderConfig
from smedjan.ops.w8a8 import w8a8_linear, w8a8_lora_linear
from smedjan.runtime.session import Session
from smedjan.train.eight_bits import EightBits, Layers, Measure, weights_of


def check(backend: Backend, model: DecoderConfig, *, method: str | None, field: str) -> None:
    """ConfigError for `field` where a run of this kind has no such layers. `method` None: a forward pass alone."""
    if method is None:
        raise ConfigError("is for training", field=field, remedy="leave it out of a forward pass")
    if method != "lora":
        raise ConfigError(
            f"is for lora, whose base is frozen and held whole, not {method}",
            field=field,
            remedy="give --method lora",
        )
    backend.w8a8_measure(field=field)
    if model.conv1d:
        raise ConfigError("no linear layer of the blocks has a weight [out, in]", field=field, remedy="leave it out")


def lay(session: Session) -> None:
    """Codes beside the blocks' linear weights, made of the values that the session has."""
    backend, names = session.backend, session.config.linear_weights()
    for name in names:
        parts, _, _ = int8.quantize(backend.to_raw(session.parameters[name]))
        session.parameters.update({f"{name}.{suffix}": backend.from_raw(raw) for suffix, raw in parts.items()})
    session.w8a8 = names


def layers(graph: Graph, *, field: str) -> Layers:
    found = {node: weights_of(node) for node in graph.nodes if node.op in (w8a8_linear, w8a8_lora_linear)}
    assert found, f"{field}: no layer, of a model that `check` let pass"
    return found


def measure(session: Session, *, field: str) -> Measure:
    of_arrays, held = session.backend.w8a8_measure(field=field), session.parameters
    return lambda x, weight: of_arrays(x, held[weight], held[f"{weight}.{int8.CODES}"], held[f"{weight}.{int8.SCALE}"])


INT8_FORWARD = EightBits(key="int8_forward", numbers="8-bit integers", layers=layers, measure=measure)
