"""Where a program is evaluated: its calls cut into segments, so that what is alive follows liveness, not laziness.

MLX evaluates what it was asked for in an order of its own, and may allocate far ahead of what runs. Cut into segments
that are asked for one after the other, a program holds at the start of each what later ones read, and inside it at most
all that the segment makes. Segments end where a block's calls do, so that equal blocks are equal segments, traced and
compiled once; and, inside blocks, where what is made on top of what is alive would be more than the program's peak.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from smedjan.backends.mlx_metal.cache import HOST_INPUTS
from smedjan.backends.mlx_metal.traced import Footprint, Given, Result, row_major, trace
from smedjan.graph.node import Graph, Node
from smedjan.graph.program import NONE_SLOT, Call
from smedjan.graph.tensor import Tensor

SLACK = 8
"""A segment may hold more than the peak that no order of evaluation goes below: by an eighth of what is not inputs."""

_FOOTPRINTS: dict[Hashable, Footprint] = {}


@dataclass(frozen=True, slots=True)
class Segment:
    """Calls `first` to `last` of a program. `key`: equal for segments that one function computes, given `sites`."""

    first: int
    last: int
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    frees: tuple[int, ...]
    donated: tuple[tuple[int, int], ...]
    """(slot of an input of the program, place in `outs` of what replaces it)"""
    key: Hashable
    sites: tuple[int, ...]
    dynamic: bool
    """Whether a host integer decides shapes in it: it is not compiled, which each value would trace anew."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """peak  bytes that are alive at most, inputs included; `largest` those of the largest array that is made
    inputs  bytes of the program's inputs"""

    segments: tuple[Segment, ...]
    peak: int
    largest: int
    inputs: int
    extra: dict[Node, int]


@dataclass(slots=True)
class _Move:
    """A call's bytes: on top of what is alive while it runs, made for later ones, and freed behind it."""

    extra: int
    made: int
    freed: int
    largest: int


def function_of(call: Call) -> Callable[..., Any]:
    return call.run.func if isinstance(call.run, partial) else call.run


@dataclass
class _Buffers:
    """Which tensors lie in one buffer, how, and when a buffer is read for the last time."""

    graph: Graph
    calls: Sequence[Call]
    fused: bool
    told: Mapping[Node, int]
    absent: set[Tensor] = field(default_factory=set)
    root: dict[Tensor, Tensor] = field(default_factory=dict)
    strides: dict[Tensor, tuple[int, ...]] = field(default_factory=dict)
    nbytes: dict[Tensor, int] = field(default_factory=dict)

    def moves(self) -> list[_Move]:
        read = {tensor for call in self.calls for tensor in call.node.inputs if tensor is not None}
        self.read = read | set(self.graph.outputs.values())
        for tensor in self.graph.inputs.values():
            self.root[tensor], self.strides[tensor], self.nbytes[tensor] = (
                tensor,
                row_major(tensor.shape),
                tensor.nbytes,
            )
        # Twice: which call reads a buffer last is known when it is known what lies in it.
        for _ in range(2):
            last = self._last_reads()
            found = [self._move(position, call, last) for position, call in enumerate(self.calls)]
        return found

    def _last_reads(self) -> dict[Tensor, int]:
        last: dict[Tensor, int] = {}
        donated: set[Tensor] = set()
        for position, call in enumerate(self.calls):
            for tensor in (*call.node.inputs, *call.node.outputs):
                if tensor is not None:
                    last[self.root.get(tensor, tensor)] = position
            if call.node.op.name not in HOST_INPUTS:
                donated |= {t for _, index in call.node.op.donated(call.node) if (t := call.node.inputs[index])}
        for tensor in self.graph.outputs.values():
            last[self.root.get(tensor, tensor)] = len(self.calls)
        for tensor in self.graph.inputs.values():
            if tensor not in donated:
                last[tensor] = len(self.calls)
        return last

    def _move(self, position: int, call: Call, last: dict[Tensor, int]) -> _Move:
        node = call.node
        wanted = tuple(tensor.index for tensor in node.outputs if tensor in self.read)
        if node.op.name in HOST_INPUTS:
            source = node.inputs[0]
            assert source is not None
            found = Footprint(0, 0, (Result(0, row_major(source.shape), 0),) if wanted else ())
        elif node in self.told:
            outs = tuple(Result(None, row_major(node.outputs[i].shape), node.outputs[i].nbytes) for i in wanted)
            largest = max((out.nbytes for out in outs), default=0)
            found = Footprint(sum(out.nbytes for out in outs) + self.told[node], max(largest, self.told[node]), outs)
        else:
            found = self._footprint(position, call, wanted, last)
        made = 0
        given = [tensor for tensor in node.inputs if tensor is not None and tensor not in self.absent]
        for index, result in zip(wanted, found.results, strict=True):
            out = node.outputs[index]
            if not result.there:
                self.absent.add(out)
                continue
            self.strides[out] = result.strides
            if result.alias is not None:
                self.root[out] = self.root[given[result.alias]]
            else:
                self.root[out], self.nbytes[out] = out, result.nbytes
                made += result.nbytes
        there = [node.outputs[index] for index in wanted if node.outputs[index] not in self.absent]
        roots = {self.root[tensor] for tensor in (*given, *there)}
        freed = sum(self.nbytes[root] for root in roots if last.get(root) == position)
        return _Move(max(found.extra, 0), made, freed, found.largest)

    def _footprint(self, position: int, call: Call, wanted: tuple[int, ...], last: dict[Tensor, int]) -> Footprint:
        if not wanted:
            return Footprint(0, 0, ())
        node, numbers = call.node, dict[Tensor, int]()
        given = [
            None
            if tensor is None or tensor in self.absent
            else Given(
                tensor.spec,
                self.strides[tensor],
                numbers.setdefault(self.root[tensor], len(numbers)),
                last.get(self.root[tensor]) == position,
                self.nbytes[self.root[tensor]],
            )
            for tensor in node.inputs
        ]
        key = (function_of(call), _attrs(node), tuple(given), wanted, self.fused)
        if key not in _FOOTPRINTS:
            _FOOTPRINTS[key] = trace(call.run, given, wanted, fused=self.fused)
        return _FOOTPRINTS[key]


def _attrs(node: Node) -> tuple[tuple[str, Any], ...]:
    """Sites, of which random numbers are drawn, are given to a function with its arrays."""
    return tuple(sorted((name, value) for name, value in node.attrs.items() if name != "site"))


def schedule(
    graph: Graph,
    calls: Sequence[Call],
    slots: dict[Tensor, int],
    *,
    fused: bool,
    told: Mapping[Node, int],
    cut: bool = True,
) -> Schedule:
    """`told`: what some nodes take besides their results, where a rule says so itself and is not traced. `cut` False:
    as few segments as there can be, whatever they need."""
    apart = dynamic(graph, calls)
    moves = _Buffers(graph, calls, fused, told).moves()
    inputs = alive = sum(tensor.nbytes for tensor in graph.inputs.values())
    before, peak = [], alive
    for move in moves:
        before.append(alive)
        peak = max(peak, alive + move.extra)
        alive += move.made - move.freed
    target = peak + (peak - inputs) // SLACK
    blocks = list(_runs(calls, _scope if cut else lambda node: fused and node in apart))
    keys = [_key(graph, calls, moves, *block) for block in blocks]
    room: dict[Hashable, int] = {}
    for key, (first, _) in zip(keys, blocks, strict=True):
        room[key] = min(room.get(key, target), target - before[first])
    segments, most = [], peak
    describe = _Describe(graph, calls, slots, apart)
    for key, (first, last) in zip(keys, blocks, strict=True):
        for start, stop in _cut(moves, before, first, last, room[key]) if cut else [(first, last)]:
            segments.append(describe(start, stop))
            held = sum(move.made for move in moves[start:stop]) + max(m.extra - m.made for m in moves[start:stop])
            most = max(most, before[start] + held) if stop - start > 1 else most
    largest = max((move.largest for move in moves), default=0)
    extra = {call.node: move.extra for call, move in zip(calls, moves, strict=True)}
    return Schedule(tuple(segments), most, largest, inputs, extra)


def dynamic(graph: Graph, calls: Sequence[Call]) -> set[Node]:
    """The nodes whose shapes hang on a host integer: those over a cache's values and a mask of them, up to attention,
    whose results are as long as its queries."""
    if not any(call.node.op.name in HOST_INPUTS for call in calls):
        return set()
    found: set[Node] = set()
    tensors: set[Tensor] = {tensor for name, tensor in graph.inputs.items() if name == "attention_mask"}
    for call in calls:
        node = call.node
        if node.op.name in HOST_INPUTS or any(tensor in tensors for tensor in node.inputs):
            found.add(node)
            if node.op.name not in ("attention", "sdpa"):
                tensors.update(node.outputs)
    return found


def _runs(calls: Sequence[Call], of: Callable[[Node], Any]) -> Iterator[tuple[int, int]]:
    """Calls one behind another of which `of` says the same."""
    first, found = 0, None
    for position, call in enumerate(calls):
        last, found = found, of(call.node)
        if position and found != last:
            yield first, position
            first = position
    if calls:
        yield first, len(calls)


def _scope(node: Node) -> tuple[str, ...]:
    """A layer, forward or backward, or none."""
    parts = node.scope.split(".")
    layer = (parts[0], parts[1]) if parts[0] == "layers" and len(parts) > 1 else ()
    return (*layer, "backward") if "backward" in parts else layer


def _key(graph: Graph, calls: Sequence[Call], moves: Sequence[_Move], first: int, last: int) -> Hashable:
    """Equal for blocks of equal calls that take and free as many bytes."""
    return tuple(
        (function_of(call), _attrs(call.node), tuple(t and t.spec for t in call.node.inputs), move.extra, move.freed)
        for call, move in zip(calls[first:last], moves[first:last], strict=True)
    )


def _cut(moves: Sequence[_Move], before: Sequence[int], first: int, last: int, room: int) -> Iterator[tuple[int, int]]:
    """Ranges as long as what is made in each, with the most that a call takes, fits into `room`, counted from what is
    alive at the block's start."""
    start, held, spare = first, 0, 0
    for position in range(first, last):
        move = moves[position]
        held, spare = held + move.made, max(spare, move.extra - move.made)
        if position > start and before[start] - before[first] + held + spare > room:
            yield start, position
            start, held, spare = position, move.made, move.extra - move.made
    yield start, last


class _Describe:
    """Segments from ranges of calls."""

    def __init__(self, graph: Graph, calls: Sequence[Call], slots: dict[Tensor, int], apart: Set[Node]) -> None:
        self.calls, self.apart = calls, apart
        self.names = {slots[tensor] for tensor in graph.inputs.values()}
        self.kept = {slots[tensor] for tensor in graph.outputs.values()}
        self.last: dict[int, int] = {}
        for position, call in enumerate(calls):
            for slot in call.ins:
                self.last[slot] = position
        self.tensors = {slot: tensor for tensor, slot in slots.items()}

    def __call__(self, first: int, last: int) -> Segment:
        calls = self.calls[first:last]
        made = [slot for call in calls for slot in call.outs]
        own = set(made)
        ins = tuple(dict.fromkeys(s for call in calls for s in call.ins if s not in own and s != NONE_SLOT))
        outs = tuple(slot for slot in made if slot in self.kept or self.last.get(slot, -1) >= last)
        frees = tuple(slot for slot in ins if slot not in self.kept and self.last[slot] < last)
        donated = tuple(
            (call.ins[given], outs.index(call.outs[out]))
            for call in calls
            if call.node.op.name not in HOST_INPUTS
            for out, given in call.node.op.donated(call.node)
            if call.ins[given] in self.names and call.outs[out] in outs
        )
        place = {slot: number for number, slot in enumerate((NONE_SLOT, *ins, *made))}
        key = (
            tuple(
                (function_of(call), _attrs(call.node), tuple(map(place.__getitem__, (*call.ins, *call.outs))))
                for call in calls
            ),
            tuple(self.tensors[slot].spec for slot in ins),
            tuple(place[slot] for slot in outs),
        )
        sites = tuple(call.node.attrs["site"] for call in calls if "site" in call.node.attrs)
        hangs = any(call.node in self.apart for call in calls)
        return Segment(first, last, ins, outs, frees, donated, key, sites, hangs)


def function(segment: Segment, calls: Sequence[Call]) -> Callable[..., tuple[Any, ...]]:
    """`f(sites, *arrays) -> arrays` of a segment's `ins` and `outs`; values are let go of after their last use."""
    calls = calls[segment.first : segment.last]
    made = [slot for call in calls for slot in call.outs]
    place = {slot: number for number, slot in enumerate((NONE_SLOT, *segment.ins, *made))}
    outs = [place[slot] for slot in segment.outs]
    steps = []
    for call in calls:
        attrs = {name: value for name, value in call.node.attrs.items() if name != "site"}
        rule = partial(function_of(call), **attrs) if attrs else function_of(call)
        ins, to = [place[slot] for slot in call.ins], [place[slot] for slot in call.outs]
        frees = [place[slot] for slot in call.frees if slot not in segment.outs]
        steps.append((rule, ins, to, frees, "site" in call.node.attrs))

    def run(sites: Sequence[Any], *arrays: Any) -> tuple[Any, ...]:
        values: list[Any] = [None, *arrays, *(None,) * len(made)]
        del arrays
        left = iter(sites)
        for call, ins, to, frees, sited in steps:
            given = [values[index] for index in ins]
            found = call(*given, site=next(left)) if sited else call(*given)
            del given
            for index, value in zip(to, found if len(to) > 1 else (found,), strict=True):
                values[index] = value
            del found
            for index in frees:
                values[index] = None
        return tuple(values[index] for index in outs)

    return run
