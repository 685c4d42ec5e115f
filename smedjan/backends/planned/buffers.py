"""Which bytes hold which value: every tensor of a graph gets a place before anything runs.

A store is a piece of memory: an input's or an output's own, or a part of the arena, which values share whose lives do
not meet. A place is a store and how the tensor lies in it, kept as a meta array. Views cost nothing; a rule that works
in place takes over a dead input's place; the parts of a concatenation are written where the whole will be read.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor as Array

from smedjan.backends.planned.table import KernelRule, ViewRule
from smedjan.backends.torch_reference.elementwise import DTYPES
from smedjan.graph.lowering import Rule
from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.tensor import Tensor

ALIGNMENT = 256
"""Bytes: of every store in the arena, as torch's allocator has it; cuBLAS and 128-bit accesses want 16."""

INPUT_STORE, OUTPUT_STORE, ARENA, HOST = "input", "output", "arena", "host"


@dataclass(eq=False, slots=True)
class Store:
    """`kind`: the graph's input or output of that `name`, a buffer of the host, or a part of the arena at byte
    `offset`; alive from position `first` to `last` of the nodes."""

    kind: str
    dtype: torch.dtype
    numel: int
    first: int
    last: int
    name: str = ""
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Place:
    store: Store
    array: Array
    """On the meta device, its offset counted from the store's begin."""


@dataclass(eq=False)
class Buffers:
    """
    places   of every tensor that is computed or given
    copies   position -> (from, to): for views that strides do not allow, and for outputs computed elsewhere
    elided   (concatenation, part): parts that are written in place
    arena    bytes
    """

    places: dict[Tensor, Place] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)
    copies: dict[int, list[tuple[Place, Place]]] = field(default_factory=dict)
    elided: set[tuple[Node, int]] = field(default_factory=set)
    arena: int = 0


def plan(graph: Graph, nodes: Sequence[Node], rules: Sequence[Rule]) -> Buffers:
    """Places for all tensors; `settle` gives the arena's stores their offsets once their scratch is known too."""
    return _Planner(graph, nodes, rules).run()


class _Planner:
    def __init__(self, graph: Graph, nodes: Sequence[Node], rules: Sequence[Rule]) -> None:
        self.graph, self.nodes, self.rules = graph, nodes, rules
        self.made = Buffers()
        self.position = {node: index for index, node in enumerate(nodes)}
        self.reads: dict[Tensor, int] = {}
        for index, node in enumerate(nodes):
            for tensor in node.inputs:
                if tensor is not None:
                    self.reads[tensor] = index
        self.end = len(nodes)
        for tensor in graph.outputs.values():
            self.reads[tensor] = self.end
        self.root: dict[Tensor, Tensor] = {}
        self.family: dict[Tensor, list[Tensor]] = {}
        self.region: dict[Tensor, tuple[tuple[Node, int], ...]] = {}
        """Which part of its root a tensor is: the pieces of splits that lead to it. Pieces of one split do not meet."""
        self.over: dict[Tensor, Tensor] = {}
        """Tensors that lie where another one lay: results of in-place and donating rules, and views."""
        self.targets: dict[Tensor, tuple[Node, int]] = {}
        self.parts: dict[Tensor, Array] = {}

    def run(self) -> Buffers:
        for node in self.graph.nodes:
            if node.op is INPUT:
                self._own(node.outputs[0])
        for node, rule in zip(self.nodes, self.rules, strict=True):
            self._relate(node, rule)
        for node, rule in zip(self.nodes, self.rules, strict=True):
            if node.op.name == "concat" and node.outputs[0] not in self.over:
                self._elide(node, rule)
        self.made.elided |= set(self.targets.values())
        for name, tensor in self.graph.inputs.items():
            self._store(tensor, INPUT_STORE, name, first=-1)
        for node, rule in zip(self.nodes, self.rules, strict=True):
            self._place(node, rule)
        self._outputs()
        self._lives()
        return self.made

    # Who shares a store with whom: by liveness alone, before anything has a place.

    def _own(self, tensor: Tensor) -> None:
        self.root[tensor], self.family[tensor], self.region[tensor] = tensor, [tensor], ()

    def _join(self, tensor: Tensor, other: Tensor, piece: tuple[tuple[Node, int], ...] = ()) -> None:
        root = self.root[other]
        self.root[tensor], self.over[tensor], self.region[tensor] = root, other, self.region[other] + piece
        self.family[root].append(tensor)

    def _meet(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors may have bytes in common."""
        if self.root[one] is not self.root[other]:
            return False
        for (node, index), (node2, index2) in zip(self.region[one], self.region[other], strict=False):
            if node is not node2 or index != index2:
                return node is not node2
        return True

    def _dead_after(self, tensor: Tensor, position: int) -> bool:
        """Nobody reads these bytes behind `position`, and they are ours to write to."""
        root = self.root[tensor]
        if root.node.op is INPUT:
            return False
        return all(
            self.reads.get(other, -1) <= position or not self._meet(tensor, other) for other in self.family[root]
        )

    def _relate(self, node: Node, rule: Rule) -> None:
        position = self.position[node]
        if isinstance(rule, ViewRule):
            for index, out in enumerate(node.outputs):
                self._join(out, _given(node, 0), ((node, index),) if len(node.outputs) > 1 else ())
            return
        assert isinstance(rule, KernelRule), f"{node.op.name}: {rule.label} is no rule of this backend"
        whole = self._reassembled(node) if node.op.name == "concat" else None
        if whole is not None:
            self._join(node.outputs[0], whole)
            self.made.elided.update((node, index) for index in range(len(node.inputs)))
            return
        taken: set[int] = set()
        placed: set[int] = set()
        for index, given in rule.donates(node):
            self._join(node.outputs[index], _given(node, given))
            placed.add(index)
            taken.add(given)
        for index, given in rule.inplace(node):
            source = node.inputs[given]
            out = node.outputs[index]
            if index in placed or given in taken or source is None or source.spec != out.spec:
                continue
            if out not in self.reads or not self._dead_after(source, position) or not self._alone(node, given):
                continue
            self._join(out, source)
            placed.add(index)
            taken.add(given)
        for index, out in enumerate(node.outputs):
            if index not in placed:
                self._own(out)

    def _alone(self, node: Node, given: int) -> bool:
        """No other input of the node has bytes in common with this one: it would be written to while it is read."""
        source = node.inputs[given]
        assert source is not None
        return not any(
            other is not None and index != given and self._meet(other, source)
            for index, other in enumerate(node.inputs)
        )

    def _reassembled(self, node: Node) -> Tensor | None:
        """What was split into the places where this concatenation's parts lie now, all of them in order."""
        parts = [part for part in node.inputs if part is not None]
        regions = [self.region[part] for part in parts]
        if not all(regions) or len({self.root[part] for part in parts}) != 1:
            return None
        cut = regions[0][-1][0]
        whole = cut.inputs[0]
        assert whole is not None
        ndim = whole.ndim
        same = cut.op.name == "split" and cut.attrs["dim"] % ndim == node.attrs["dim"] % ndim
        same = same and whole.spec == node.outputs[0].spec and len(parts) == len(cut.outputs)
        regular = all(region == (*self.region[whole], (cut, index)) for index, region in enumerate(regions))
        return whole if same and regular and whole.node.op is not INPUT else None

    # The parts of a concatenation, written in place.

    def _elide(self, node: Node, rule: Rule) -> None:
        for index, part in enumerate(node.inputs):
            assert part is not None
            root = self.root[part]
            if root.node.op is INPUT or root in self.targets or root.numel != part.numel:
                continue
            if root.node.op.name == "concat":
                continue  # its own parts lie where it does
            producer = self.rules[self.position[root.node]]
            free = isinstance(producer, KernelRule) and producer.strided and root.dtype == part.dtype
            last = max(self.reads.get(other, -1) for other in self.family[root])
            again = sum(self.root[other] is root for other in node.inputs if other is not None) > 1
            if free and last <= self.position[node] and not again:
                array = self._part(node, index, part, root)
                if array is not None:
                    self.targets[root] = (node, index)
                    self.parts[root] = array

    def _part(self, node: Node, index: int, part: Tensor, root: Tensor) -> Array | None:
        """Where the root of a concatenation's part lies: its slice of the whole, seen through the views between; None
        where a view has no way back."""
        whole, dim = node.outputs[0], node.attrs["dim"] % node.outputs[0].ndim
        start = sum(t.shape[dim] for t in node.inputs[:index] if t is not None)
        array = torch.empty(whole.shape, dtype=DTYPES[whole.dtype], device="meta").narrow(dim, start, part.shape[dim])
        while part is not root:
            rule = self.rules[self.position[part.node]]
            if isinstance(rule, ViewRule):
                if rule.inverse is None:
                    return None
                try:
                    array = rule.inverse(array, part.node)
                except RuntimeError:  # torch's word for strides that no view can have
                    return None
            part = self.over[part]
        return array

    def _target(self, root: Tensor) -> Place:
        whole = self.targets[root][0].outputs[0]
        if whole not in self.made.places:
            self._store(whole, ARENA, "", first=self.position[root.node])
        return Place(self.made.places[whole].store, self.parts[root])

    # Places.

    def _store(
        self, tensor: Tensor, kind: str, name: str, *, first: int, order: tuple[int, ...] | None = None
    ) -> Place:
        store = Store(kind, DTYPES[tensor.dtype], tensor.numel, first, first, name)
        self.made.stores.append(store)
        array = torch.empty(tensor.shape, dtype=store.dtype, device="meta")
        if order is not None:
            back = sorted(range(len(order)), key=order.__getitem__)
            array = torch.empty([tensor.shape[dim] for dim in order], dtype=store.dtype, device="meta").permute(back)
        place = self.made.places[tensor] = Place(store, array)
        return place

    def _place(self, node: Node, rule: Rule) -> None:
        places, position = self.made.places, self.position[node]
        if isinstance(rule, ViewRule):
            self._view(node, rule, position)
            return
        assert isinstance(rule, KernelRule)
        for index, out in enumerate(node.outputs):
            if out in self.over:
                places[out] = places[self.over[out]]
            elif out in self.targets:
                places[out] = self._target(out)
            elif out not in places and out in self.reads:
                kind = HOST if node.op.name == "to_host" else ARENA
                self._store(out, kind, "", first=position, order=rule.order.get(index))

    def _view(self, node: Node, rule: ViewRule, position: int) -> None:
        places = self.made.places
        source = places[_given(node, 0)]
        try:
            seen = rule.view(source.array, **node.attrs)
        except RuntimeError:  # torch's word for strides that no view can have
            dense = Store(ARENA, source.store.dtype, source.array.numel(), position, position)
            self.made.stores.append(dense)
            if rule.inverse is None:
                array = torch.empty(source.array.shape, dtype=dense.dtype, device="meta")
            else:
                array = rule.inverse(torch.empty(node.outputs[0].shape, dtype=dense.dtype, device="meta"), node)
            copied = Place(dense, array)
            self.made.copies.setdefault(position, []).append((source, copied))
            source, seen = copied, rule.view(array, **node.attrs)
        for out, array in zip(node.outputs, seen if isinstance(seen, tuple) else (seen,), strict=True):
            places[out] = Place(source.store, array)

    def _outputs(self) -> None:
        """Outputs lie in memory of their own, in which they are computed where that is possible."""
        for name, tensor in self.graph.outputs.items():
            place = self.made.places[tensor]
            whole = place.array.is_contiguous() and place.array.numel() == place.store.numel
            if place.store.kind == ARENA and whole:
                place.store.kind, place.store.name = OUTPUT_STORE, name
            elif not (place.store.kind == INPUT_STORE and whole and tensor in self.over):
                store = Store(OUTPUT_STORE, place.store.dtype, tensor.numel, self.end, self.end, name)
                self.made.stores.append(store)
                own = Place(store, torch.empty(tensor.shape, dtype=store.dtype, device="meta"))
                self.made.copies.setdefault(self.end, []).append((place, own))

    def _lives(self) -> None:
        for tensor, place in self.made.places.items():
            place.store.last = max(place.store.last, self.reads.get(tensor, place.store.first))
        for position, copies in self.made.copies.items():
            for source, copied in copies:
                source.store.last = max(source.store.last, position)
                copied.store.last = max(copied.store.last, position)


def _given(node: Node, index: int) -> Tensor:
    tensor = node.inputs[index]
    assert tensor is not None, f"{node.op.name} works in place on an input that is not given"
    return tensor


def settle(stores: Sequence[Store]) -> int:
    """Gives the arena's stores offsets that do not meet while both are alive, the largest first, each at the lowest
    place that is free; returns the arena's bytes."""
    placed: list[tuple[int, int, int, int]] = []  # begin, end, first, last; in order
    size = 0
    arena = [(store.nbytes, store) for store in stores if store.kind == ARENA and store.nbytes]
    for needed, store in sorted(arena, key=lambda pair: (-pair[0], pair[1].first)):
        offset, own_first, own_last = 0, store.first, store.last
        for begin, end, first, last in placed:
            if first > own_last or own_first > last:
                continue
            if offset + needed <= begin:
                break
            if end > offset:
                offset = end
        store.offset = offset
        end = -(-(offset + needed) // ALIGNMENT) * ALIGNMENT
        insort(placed, (offset, end, own_first, own_last))
        size = max(size, end)
    return size


def overlaps(stores: Sequence[Store]) -> list[tuple[Store, Store]]:
    """Pairs of arena stores that meet in time and in space: none, unless `settle` is wrong."""
    arena = sorted((s for s in stores if s.kind == ARENA and s.nbytes), key=lambda store: store.offset)
    return [
        (one, other)
        for index, one in enumerate(arena)
        for other in arena[index + 1 :]
        if other.offset < one.offset + one.nbytes and one.first <= other.last and other.first <= one.last
    ]
