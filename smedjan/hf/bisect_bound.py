"""Where a fast backend leaves its bound: the first layer and op, by error.

Two things can be wrong. If the exact backend with the same weights leaves transformers too, it is the model, and the
bits tell where (bisect). Else it is the backend. That has other ops than the exact one, but both come from one declared
graph, each node of which has a scope of its own, whatever it was decomposed into: there the two are compared, in order,
by the formula of a whole case,

    |ours - ref| <= 2 max |exact - ref| + 2 u |ref|        (Euclidean norms, relative to |ref|)

with the exact backend in the case's dtype for `exact`, float64 of which nothing is narrowed for `ref`, and the maximum
over what was compared so far: one lucky value of the exact backend's bounds nothing. The first value beyond is named.
Layers of one input and the rotations of a layer are not taken together there: each op keeps its scope. Behind the
forward pass, gradients are compared in the order in which the backward pass makes them, the last layer's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from smedjan.checkpoint.dtype import convert
from smedjan.data.collate import Batch
from smedjan.graph.node import Graph, Node
from smedjan.graph.tensor import FLOATS
from smedjan.hf.bisect import bisect
from smedjan.hf.peer import Feed, Peer, feeds
from smedjan.hf.watch import (
    Parted,
    Watched,
    backward,
    behind,
    decoded,
    layer_of,
    module_of,
    op_of,
    read_parameters,
    ulps,
)
from smedjan.runtime.select import backend as select_backend
from smedjan.runtime.session import Session

ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
FEW = 16
"""Elements of a value whose norm is too much of a chance to be compared."""


@dataclass(frozen=True, eq=False)
class _Value:
    node: Node
    data: np.ndarray


def bisect_bound(
    session: Session, peer: Peer, batch: Batch, mode: str, *, prefills: tuple[int, ...] = ()
) -> Parted | None:
    """The first layer and op of a fast backend whose error exceeds its bound, or None. Arguments as of `bisect`.

    What a padding token alone has is not looked at, nor values whose rows the fast backend leaves out.
    """
    assert not session.backend.exact, "an exact backend is held to bits: see bisect"
    exact = _in_torch(session, session.dtype)
    parted = bisect(exact, peer, batch, mode, prefills=prefills)
    if parted is not None:
        return parted
    wide, script = _in_torch(session, "float64"), list(feeds(batch, prefills or (batch.input_ids.shape[1],)))
    ours = _values(session, batch, mode, script)
    theirs, truth = _values(exact, batch, mode, script), _values(wide, batch, mode, script)
    roundoff, largest = ROUNDOFF[session.dtype], 0.0
    for name, value in ours.items():
        if name not in truth or name not in theirs or value.data.shape != truth[name].data.shape:
            continue
        ref, scale = truth[name].data, max(_norm(truth[name].data), float(np.finfo(np.float64).tiny))
        largest = max(largest, _norm(theirs[name].data - ref) / scale)
        if not _norm(value.data - ref) / scale <= 2 * largest + 2 * roundoff:
            return Parted(
                layer=layer_of(value.node),
                behind=behind(value.node, value.node.graph),
                op=op_of(value.node),
                primitive=value.node.op.name,
                module=module_of(value.node, session.parameters),
                backward=backward(value.node) or name.startswith("grad."),
                ulp=ulps(value.data, theirs[name].data, session.dtype),
                peer="torch_reference",
            )
    return None


def _in_torch(session: Session, dtype: str) -> Session:
    """The same weights on the exact backend; those of float64 are for a run that narrows nothing."""
    backend = select_backend("torch_reference")
    to_raw = session.backend.to_raw
    parameters = {name: backend.from_raw(convert(to_raw(array), dtype)) for name, array in session.parameters.items()}
    return Session(backend, session.config, parameters, dtype, attention=session.attention)


def _values(session: Session, batch: Batch, mode: str, script: Sequence[Feed]) -> dict[str, _Value]:
    """What each node of the declared graph came to, in order; in mode gradients then "grad.NAME", the last first."""
    from smedjan.hf.peer_trace import Wide

    watched, found = Watched.of(session), dict[str, _Value]()
    with Wide() if session.dtype == "float64" else nullcontext():
        if mode == "decode":
            results = decoded(watched, script)
            for feed in script:
                watched.see = _shown(watched, found, feed.mask, feed.ids, f"{feed.name} ")
                next(results)
            return found
        watched.see = _shown(watched, found, batch.attention_mask, batch.input_ids, "")
        if mode == "logits":
            watched.logits(batch)
            return found
        graphs: list[Graph] = []
        watched.began = graphs.append
        names = read_parameters(watched, batch)
        _, grads = watched.micro(batch, names, num_items=batch.trained_tokens)
    nodes = {name: graphs[-1].outputs[f"grad.{name}"].node for name in names}
    readers = graphs[-1].readers()
    for name in sorted(names, key=lambda name: nodes[name].id):
        first = readers[graphs[-1].inputs[name]][0]
        found[f"grad.{name}"] = _Value(first, _float64(session, grads[name]).reshape(-1))
    return found


def _shown(session: Session, found: dict[str, _Value], mask: Any, ids: np.ndarray, prefix: str) -> Any:
    """Keeps the last value of every scope of the forward pass: the result of the node that the scope is of."""

    def see(node: Node, outputs: tuple[Any, ...]) -> None:
        tensor, value = node.outputs[0], outputs[0]
        if backward(node) or value is None or tensor.dtype not in FLOATS or tensor.numel < FEW:
            return
        found[prefix + node.scope] = _Value(node, _real(_float64(session, value), mask, ids))

    return see


def _float64(session: Session, value: Any) -> np.ndarray:
    raw = session.backend.to_raw(value)
    # A copy: the raw bytes of a float64 cache are the cache itself, which the next step writes into.
    return np.frombuffer(convert(raw, "float64").data, dtype=np.float64).reshape(raw.shape).copy()


def _real(value: np.ndarray, mask: np.ndarray | None, ids: np.ndarray) -> np.ndarray:
    """The elements of [B, T, ...] or [B, H, T, ...] without the padding tokens; of anything else, all."""
    if mask is None:
        return value.reshape(-1)
    real = mask[:, -ids.shape[1] :] > 0
    if value.ndim == 4 and value.shape[0] == real.shape[0] and value.shape[2] == real.shape[1]:
        value = value.swapaxes(1, 2)
    if value.ndim >= 2 and value.shape[:2] == real.shape:
        value = value[real]
    return value.reshape(-1)


def _norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(value))
