"""Our side of a bisection: a session whose programs show every value, and the names by which a value is reported.

Every node of the declared graph gets a scope of its own, `layers.7.self_attn.rope#0`, before the ops that the backend
lacks are decomposed and the backward pass is written down. Whatever comes of it keeps that scope, so that a product in
the middle of a rotation is still known as a part of layer 7's rope.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np

from smedjan.data.collate import Batch
from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.program import Observer, Program
from smedjan.graph.rewrite import Replay
from smedjan.hf.peer import Feed
from smedjan.models.decoder import Decoder
from smedjan.runtime.session import Cache, Session

_TAG = re.compile(r"(?:^|\.)([a-z0-9_]+)#\d+")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)")


@dataclass(frozen=True, kw_only=True)
class Parted:
    """Where two computations part: the first value of ours that transformers never made, though it had all it takes.

    layer      None for what stands outside the layers, behind them where `behind`; what is made once for all of them (a
               rotary table) has the number of the first that reads it
    op         as the model declares it ("rope"); `primitive` is the part of it that differs ("mul")
    module     HF's module where the op has a parameter, else the graph's scope
    ulp        the largest distance from the nearest value that transformers made; None where it made none of that size
    peer       what made that nearest value: "aten.mul in model.layers.7.self_attn"
    """

    layer: int | None
    behind: bool
    op: str
    primitive: str
    module: str
    backward: bool
    ulp: int | None
    peer: str

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer}, "
        far = "no value like it in transformers" if self.ulp is None else f"{self.ulp:,} ulp"
        return f"{where}{self.op}{' (backward)' if self.backward else ''}: {far}"


class _Tagged(Replay):
    """Copies a graph, each node in a scope of its own."""

    def __init__(self, source: Graph) -> None:
        super().__init__(source)
        self.made: Counter[tuple[str, str]] = Counter()

    def visit(self, node: Node) -> None:
        if node.op is INPUT:
            self.copy(node)
            return
        number = self.made[node.scope, node.op.name]
        self.made[node.scope, node.op.name] += 1
        with self.graph.scope(f"{node.op.name}#{number}"):
            self.copy(node)


class _Shown:
    """The backend's own program, planned where that is how it runs, which shows every value to a session that looks."""

    def __init__(self, program: Program, session: Watched) -> None:
        self._program, self._session = program, session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self._session.see is None:
            return self._program(inputs)
        self._session.began(self._program.graph)
        return self._program(inputs, observe=self._session.see)


class Watched(Session):
    """A session of the same arrays. While `see` is set, it is given every node and its outputs."""

    @classmethod
    def of(cls, session: Session) -> Watched:
        return cls(**{field.name: getattr(session, field.name) for field in fields(session) if field.init})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.see: Observer | None = None
        self.began: Callable[[Graph], None] = lambda graph: None

    def forward(self, decoder: Decoder, *, train: bool = False) -> Graph:
        decoder.graph = _Tagged(decoder.graph).run()
        return super().forward(decoder, train=train)

    def finish(self, graph: Graph, *, smallest: bool = False) -> Program:
        return cast(Program, _Shown(super().finish(graph, smallest=smallest), self))


def read_parameters(session: Session, batch: Batch) -> list[str]:
    """The parameters that the logits depend on, in order: those that have a gradient."""
    graph = session.logits_program(session.form(batch)).graph
    read = {tensor for node in graph.live_nodes() for tensor in node.inputs}
    return [name for name in session.parameters if name in graph.inputs and graph.inputs[name] in read]


def decoded(session: Session, script: Sequence[Feed]) -> Iterator[tuple[Feed, Any]]:
    """(feed, logits) of each feed; the array is the backend's."""
    cache, capacity = None, max(feed.ids.shape[1] for feed in script) + len(script)
    for feed in script:
        if feed.fresh:
            cache = Cache(session, batch=len(feed.ids), capacity=capacity)
        assert cache is not None, "a script begins with a prefill"
        yield feed, cache.feed(feed.ids, feed.mask)


def run(session: Watched, batch: Batch, mode: str, script: Sequence[Feed], see: Observer) -> None:
    """One mode; of `script`, the last feed alone is shown."""
    if mode == "decode":
        session.see = see if len(script) == 1 else None
        for done, _ in enumerate(decoded(session, script), start=1):
            session.see = see if done == len(script) - 1 else None
    else:
        session.see = see
        if mode == "logits":
            session.logits(batch)
        else:
            session.micro(batch, read_parameters(session, batch), num_items=batch.trained_tokens)
    session.see = None


def op_of(node: Node) -> str:
    found = _TAG.search(node.scope)
    return found.group(1) if found else node.op.name


def layer_of(node: Node) -> int | None:
    found = _LAYER.search(node.scope)
    return int(found.group(1)) if found else None


def module_of(node: Node, parameters: Mapping[str, Any]) -> str:
    names = [t.node.attrs["name"] for t in node.inputs if t is not None and t.node.op is INPUT]
    owned = [name for name in names if name in parameters]
    if owned:
        return owned[0].rpartition(".")[0] or owned[0]
    return ".".join(part for part in node.scope.split(".") if "#" not in part and part != "backward")


def behind(node: Node, graph: Graph) -> bool:
    """Whether the op that the node is of, or is the gradient of, was declared after a layer."""
    own = node.scope.removesuffix(".backward")
    first = next(other for other in graph if layer_of(other) is not None or other.scope == own)
    return layer_of(first) is not None


def backward(node: Node) -> bool:
    return "backward" in node.scope.split(".")


def ulps(a: np.ndarray, b: np.ndarray, dtype: str) -> int:
    """The most representable numbers of `dtype` between two elements; both arrays are float32 (bfloat16 widened)."""
    keys = []
    for array in (a, b):
        bits = np.ascontiguousarray(array, dtype=np.float32).view(np.int32).astype(np.int64)
        keys.append(np.where(bits < 0, -(bits & 0x7FFFFFFF), bits) >> (16 if dtype == "bfloat16" else 0))
    return int(np.abs(keys[0] - keys[1]).max(initial=0))
