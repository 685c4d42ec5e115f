"""How long a step will take, without taking one: each distinct node of its programs timed alone, times its count.

A node is run by the rule that its program has for it, over arrays of noise (tokens, labels and rows are valid ones), so
that one node's arrays are all the memory that this takes. An update is timed on a sample of the parameters: its time
goes with their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smedjan.backends.base import Array, Backend
from smedjan.checkpoint.dtype import convert
from smedjan.checkpoint.raw import RawTensor
from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.program import Call, Program
from smedjan.graph.tensor import FLOATS, Spec, Tensor
from smedjan.models.decoder import Form
from smedjan.ops.elementwise import reshape
from smedjan.runtime.session import Session
from smedjan.train.outline import Outline

Clock = Callable[[], float]

REPEATS, ENOUGH_S = 5, 0.02
"""Runs of a node behind its first one, fewer where they take longer than this in all."""

LONG_S = 0.1
"""On a CPU, what takes as long the first time is not run again: the first touch of its pages is little of that."""

SAMPLE_BYTES = 64 << 20
"""Of the parameters on which an update is timed: more than caches hold, little beside a model."""

ONE = Spec((1,), "float32")

BLOCK = np.abs(np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32))
"""Noise, repeated as often as an array needs it. Not zeros: the kernel has one page of them for all addresses."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`ops`: seconds of a step by (op, lowering), which add up to `seconds`."""

    seconds: float
    ops: Mapping[tuple[str, str], float]


def step_time(
    outline: Outline,
    form: Form,
    *,
    accumulate: int = 1,
    most_bytes: int | None = None,
    clock: Clock = time.perf_counter,
) -> Estimate | None:
    """Of one optimizer step of `accumulate` micro-batches of `form`. None where this machine's time says nothing of the
    run's, or where one node alone takes more than `most_bytes`."""
    session = outline.session
    if not session.backend.timed:
        return None
    micros = [(outline.micro(form), 1)]
    if accumulate > 1:
        micros.append((outline.micro(form, accumulate=True), accumulate - 1))
    sample = _sample(outline)
    run = [*(program for program, _ in micros), sample]
    most = max(_bytes_of(program, call) for program in run for call in program.calls)
    if most_bytes is not None and most > most_bytes:
        return None
    times = _Times(session.backend, {**_tokens(session, run[0]), **_scalars(outline)}, clock)
    for program in run:
        times.add(program)
    spent: dict[tuple[str, str], float] = {}
    for program, count in (*micros, (outline.update, 1)):
        for kind in _kinds(program):
            spent[kind.alike] = spent.get(kind.alike, 0.0) + count * times.of(kind)
    return Estimate(seconds=sum(spent.values()), ops=spent)


def _sample(outline: Outline) -> Program:
    """The update of a part of the parameters: the smallest of each kind of state, then, as far as SAMPLE_BYTES go, one
    of each shape, and any."""
    optimizer, shapes = outline.optimizer, outline.shapes
    names = sorted(shapes, key=lambda name: Spec(*shapes[name]).nbytes)
    kinds: dict[Any, str] = {}
    alike: dict[Any, str] = {}
    for name in names:
        shape, dtype = shapes[name]
        state = {kind: stored for kind, (_, stored) in optimizer.kept(name, shape, dtype).items()}
        kinds.setdefault((dtype, tuple(state.items()), optimizer.rate(name)), name)
        alike.setdefault((shape, dtype), name)
    chosen = set(kinds.values())
    size = sum(Spec(*shapes[name]).nbytes for name in chosen)
    for name in (*alike.values(), *names):
        if name not in chosen and size < SAMPLE_BYTES:
            chosen.add(name)
            size += Spec(*shapes[name]).nbytes
    kept = {name: shapes[name] for name in shapes if name in chosen}
    exact = outline.session.backend.exact
    return outline.session.finish(optimizer.graph(kept, exact=exact, buckets=not exact))


def _tokens(session: Session, micro: Program) -> dict[str, Array]:
    """What a micro-batch is given besides parameters: tokens, places, rows and labels that are valid."""
    draw, made = np.random.default_rng(0), {}
    vocab = session.config.vocab_size
    for name, tensor in micro.graph.inputs.items():
        if name in ("input_ids", "labels"):
            value: Any = draw.integers(0, vocab, tensor.shape)
        elif name == "position_ids":
            value = np.broadcast_to(np.arange(tensor.shape[1]), tensor.shape)
        elif name in ("attention_mask", "segment_ids"):
            value = np.ones(tensor.shape)
        elif name == "loss_rows":
            value = np.arange(tensor.shape[0])
        elif name == "num_items":
            value = np.float32(max(1, micro.graph.inputs["labels"].numel))
        elif name == "dropout_key":
            value = np.zeros(tensor.shape)
        else:
            continue
        made[name] = session.host(value, tensor.dtype)
    return made


def _scalars(outline: Outline) -> dict[str, Any]:
    backend = outline.session.backend
    scalars = outline.optimizer.scalars(outline.shapes, lr=1e-6, step=1, seed=0)
    return {name: backend.scalar(value) for name, value in scalars.items()}


@dataclass(frozen=True)
class _Kind:
    """A call, what tells it from others, and which of its results are read."""

    call: Call
    key: tuple[Any, ...]
    read: tuple[int, ...]
    starts: bool

    @property
    def alike(self) -> tuple[str, str]:
        return self.call.node.op.name, self.call.label


def _kinds(program: Program) -> list[_Kind]:
    """Sites, of which random numbers are drawn, change no time."""
    read = {tensor for call in program.calls for tensor in call.node.inputs} | set(program.graph.outputs.values())
    made = []
    for call in program.calls:
        node = call.node
        attrs = repr(sorted((name, value) for name, value in node.attrs.items() if name != "site"))
        wanted = tuple(tensor.index for tensor in node.outputs if tensor in read)
        specs = tuple(tensor and tensor.spec for tensor in node.inputs)
        key = (node.op.name, call.label, attrs, specs, wanted)
        made.append(_Kind(call, key, wanted, program.starts(call)))
    return made


class _Times:
    """Seconds of the nodes that were run. `known` are the inputs of graphs that are no noise, by name."""

    def __init__(self, backend: Backend, known: Mapping[str, Any], clock: Clock) -> None:
        self.backend, self.known, self.clock = backend, known, clock
        self.seconds: dict[Any, float] = {}
        self.largest: dict[tuple[str, str], tuple[int, float]] = {}
        """(op, lowering) -> work and seconds of the largest one that was run."""
        self.results: dict[Any, dict[int, Array]] = {}
        self.whole: dict[Tensor, Array] = {}
        """Results that are no floats: places in an array, or what may be seen. Others read them as they are."""

    def add(self, program: Program) -> None:
        for kind in _kinds(program):
            wanted = [index for index in kind.read if kind.call.node.outputs[index].dtype not in FLOATS]
            if (kind.starts or wanted) and kind.key not in self.seconds:
                self._run(kind, wanted)
            for index in wanted:
                self.whole[kind.call.node.outputs[index]] = self.results[kind.key][index]

    def of(self, kind: _Kind) -> float:
        if not kind.starts:
            return 0.0
        if kind.key in self.seconds:
            return self.seconds[kind.key]
        work, seconds = self.largest[kind.alike]
        return seconds * _work(kind.call.node) / work

    def _run(self, kind: _Kind, wanted: Sequence[int]) -> None:
        node, graph = kind.call.node, Graph()
        inputs: dict[str, Any] = {}
        given: dict[Tensor | None, Tensor | None] = {None: None}
        for tensor in node.inputs:
            if tensor is not None and tensor not in given:
                name = tensor.node.attrs["name"] if tensor.node.op is INPUT else ""
                name = name if name in self.known else f"{len(inputs)}"
                inputs[name] = self._value(tensor, name)
                given[tensor] = _input(graph, tensor, name)
        specs = tuple(tensor.spec for tensor in node.outputs)
        outs = graph.add(node.op, tuple(given[tensor] for tensor in node.inputs), node.attrs, specs)
        for index in kind.read:
            graph.output(f"grad.{index}", outs[index])  # the one kind of result that no program copies
        program = self.backend.program(graph)
        lowered = [call.label for call in program.calls if call.node.op is node.op]
        assert lowered == [kind.call.label], f"{node.op.name} runs as {kind.call.label}, alone as {lowered}"
        self.backend.synchronize({name: array for name, array in inputs.items() if name not in self.known})
        self.seconds[kind.key] = seconds = self._timed(program, inputs)
        if wanted:
            made = program(inputs)
            self.results[kind.key] = {index: made[f"grad.{index}"] for index in wanted}
        if (work := _work(node)) >= self.largest.get(kind.alike, (0, 0.0))[0]:
            self.largest[kind.alike] = (work, seconds)

    def _value(self, tensor: Tensor, name: str) -> Any:
        if name in self.known:
            return self.known[name]
        if tensor.dtype in FLOATS or tensor.node.op is INPUT:
            return self.backend.from_raw(_noise(tensor.spec if tensor.ndim or tensor.node.op is INPUT else ONE))
        return self.whole[tensor]

    def _timed(self, program: Program, inputs: Mapping[str, Any]) -> float:
        began = self.clock()
        self.backend.synchronize(program(inputs))
        first = self.clock() - began
        if first > LONG_S and self.backend.device == "cpu":
            return first
        self.backend.synchronize(program(inputs))  # on a GPU, the second run is recorded
        count = REPEATS if first * REPEATS < ENOUGH_S else 1
        began = self.clock()
        for _ in range(count):
            made = program.again(inputs)
        self.backend.synchronize(made)
        return (self.clock() - began) / count


def _input(graph: Graph, tensor: Tensor, name: str) -> Tensor:
    """The tensor as an input of a graph of one node. A scalar that was computed is no number of the host: a view."""
    if tensor.node.op is INPUT or tensor.ndim:
        return graph.input(name, tensor.shape, tensor.dtype)
    return reshape(graph.input(name, (1,), tensor.dtype), shape=())


def _noise(spec: Spec) -> RawTensor:
    """Normal floats of deviation 0.02, or bytes below 128, which are codes of every 8-bit format."""
    block = convert(RawTensor.of(BLOCK * 0.02), spec.dtype) if spec.dtype in FLOATS else None
    octets = np.arange(128, dtype=np.uint8) if block is None else np.frombuffer(block.data, dtype=np.uint8)
    tiled: Any = np.resize(octets, spec.nbytes)  # numpy's stubs do not say that an array is a buffer
    return RawTensor(dtype=spec.dtype, shape=spec.shape, data=memoryview(tiled))


def _work(node: Node) -> int:
    cost = node.op.cost(node)
    return cost.flops or cost.bytes or 1


def _bytes_of(program: Program, call: Call) -> int:
    return sum(t.nbytes for t in {*call.node.inputs, *call.node.outputs} if t) + program.temporaries[call.node]
