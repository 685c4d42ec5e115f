"""The memory planner: what a training step keeps from its forward to its backward pass, makes twice, or moves away.

Nothing is given up while all fits. Otherwise, in this order and no further than needed:

1. cheap results are made again in the backward pass, those first that free most bytes for their FLOPs: norms,
   activations, rotations, sums, casts (Korthikanti et al. 2022, "Reducing Activation Recomputation", section 5);
2. whole blocks keep their input alone, the first blocks first, since they wait longest (Chen et al. 2016, "Training
   Deep Nets with Sublinear Memory Cost");
3. the kept inputs go to the host's memory and come back.

What is made twice is made by the same nodes of the same values: not a bit changes. `peak` says what a graph needs, so
that a backend decides with its own layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.op import OPS
from smedjan.graph.rewrite import Replay, prune
from smedjan.graph.tensor import Tensor

VIEWS = {
    *("identity", "reshape", "contiguous", "transpose_last"),
    *("split", "narrow", "slice_last"),
    *("swap_heads", "split_heads", "merge_heads"),
}
"""Ops whose results lie where their input does: they cost nothing and free nothing."""

CHEAP = VIEWS | {
    *("rms_norm", "layer_norm", "glu", "silu", "gelu", "gelu_new", "relu", "relu2", "tanh"),
    *("add", "sub", "mul", "scale", "divide", "add_scalar", "square", "power", "rsqrt", "_cast"),
    *("rope", "qk_norm_rope", "rope_tables", "concat", "take_rows", "embedding"),
    *("keep_mask", "dropout", "document_bounds", "nf4_dequantize", "int8_dequantize", "affine_dequantize", "div"),
}
"""Ops that wait for memory, not for arithmetic."""

NORMS = {"add_rms_norm": "rms_norm", "add_layer_norm": "layer_norm"}
"""Sums with the norm of the sum: where the sum is kept, the norm alone is made again."""


WORTH_MOVING = 1 << 12
"""Bytes below which a value stays: its transfer's start would cost more."""


@dataclass(frozen=True, slots=True)
class Decision:
    """what: "recompute" or "offload"; of: an op ("glu", in how many places) or a block ("layers.3"). Bytes that are no
    longer kept, FLOPs that are done once more."""

    what: str
    of: str
    bytes: int
    flops: int


Peak = Callable[[Graph], int]


def fit(graph: Graph, *, budget: int, peak: Peak, offload: bool = True) -> tuple[Graph, list[Decision]]:
    """The graph, changed as little as the tiers above allow so that `peak(graph) <= budget`, or as far as they go:
    without `offload`, the first two."""
    if not any(_is_backward(node) for node in graph.nodes) or peak(graph) <= budget:
        return graph, []
    step = _Step(graph)
    cheap = step.cheap()
    made, count = _least(len(cheap), lambda n: step.changed(cheap[:n]), budget, peak)
    if made is not None:
        return made, step.told(cheap[:count])
    blocks = step.blocks()
    made, count = _least(len(blocks), lambda n: step.changed(cheap, blocks[:n]), budget, peak)
    if made is not None:
        return made, step.told(cheap, blocks[:count])
    if not offload:
        return made or step.changed(cheap, blocks), step.told(cheap, blocks)
    made, count = _least(len(blocks), lambda n: step.changed(cheap, blocks, blocks[:n]), budget, peak)
    return made or step.changed(cheap, blocks, blocks), step.told(cheap, blocks, blocks[:count])


def again(graph: Graph, ops: Collection[str]) -> Graph:
    """The graph with those cheap results of `ops` made again that it would keep."""
    if not any(_is_backward(node) for node in graph.nodes):
        return graph
    step = _Step(graph)
    chosen = [root for root in step.cheap() if root.node.op.name in ops]
    return step.changed(chosen) if chosen else graph


def narrow(graph: Graph) -> Graph:
    """The graph that keeps values as they were before they were widened, and widens them once more: in QLoRA an
    adapter's float32 input is twice the bfloat16 one, which may be cheap to make again besides."""
    if not any(_is_backward(node) for node in graph.nodes):
        return graph
    step = _Step(graph)
    chosen = [root for root in step.held if root.node.op.name == "_cast" and _widens(root)]
    return step.changed(chosen) if chosen else graph


def _widens(cast: Tensor) -> bool:
    source = cast.node.inputs[0]
    return source is not None and source.nbytes < cast.nbytes


def tiers(graph: Graph, *, offload: bool = True) -> Iterator[Graph]:
    """The graph as it is, and with each tier given up as a whole on top of those before it."""
    yield graph
    if any(_is_backward(node) for node in graph.nodes):
        step = _Step(graph)
        cheap, blocks = step.cheap(), step.blocks()
        yield step.changed(cheap)
        yield step.changed(cheap, blocks)
        if not offload:
            return
        yield step.changed(cheap, blocks, blocks)


def _least(most: int, changed: Callable[[int], Graph], budget: int, peak: Peak) -> tuple[Graph | None, int]:
    """The smallest n whose graph fits, by bisection: more of the same never needs more memory, but for rounding."""
    best: tuple[Graph | None, int] = (None, most)
    low, high = 1, most
    while low <= high:
        middle = (low + high) // 2
        graph = changed(middle)
        if peak(graph) <= budget:
            best, high = (graph, middle), middle - 1
        else:
            low = middle + 1
    return best


def _is_backward(node: Node) -> bool:
    return "backward" in node.scope.split(".")


def _block(node: Node) -> str | None:
    found = re.match(r"layers\.\d+", node.scope)
    return found.group() if found else None


class _Step:
    """A training step's graph: its forward nodes, then the first backward node and all behind it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.start = next(node.id for node in graph.nodes if _is_backward(node))
        self.root: dict[Tensor, Tensor] = {}
        for node in graph.nodes:
            for out in node.outputs:
                source = node.inputs[0] if node.op.name in VIEWS else None
                self.root[out] = self.root[source] if source is not None else out
        readers = graph.readers()
        self.kept: dict[Tensor, None] = {}
        for tensor in self.root:
            if tensor.node.id < self.start and any(node.id >= self.start for node in readers.get(tensor, ())):
                self.kept[tensor] = None
        self.held = {self.root[tensor] for tensor in self.kept}
        self.family: dict[Tensor, list[Tensor]] = {}
        for tensor, root in self.root.items():
            self.family.setdefault(root, []).append(tensor)

    def _there(self, tensor: Tensor | None) -> bool:
        """Whether a value can be read in the backward pass whatever is decided about others of tier 1."""
        return tensor is None or tensor.node.op is INPUT or self.root[tensor] in self.held

    def cheap(self) -> list[Tensor]:
        """Kept values, as roots, that cheap ops make of values that are kept as well, the most bytes a FLOP first."""
        found: list[tuple[float, int, Tensor]] = []
        for root in self.held:
            node = root.node
            if node.op is INPUT or (not node.op.pure and node.op.name not in ("keep_mask", "dropout")):
                continue
            sources = node.inputs
            if node.op.name in NORMS:
                if root is node.outputs[0]:
                    continue
                sources = (node.outputs[0], *node.inputs[2:])
            elif node.op.name not in CHEAP:
                continue
            if all(self._there(source) for source in sources):
                found.append((-root.nbytes / max(node.op.cost(node).flops, 1), root.node.id, root))
        return [root for _, _, root in sorted(found, key=lambda each: each[:2])]

    def blocks(self) -> list[str]:
        """The blocks that keep something, the first one first. The last one's values are needed at once."""
        names = dict.fromkeys(name for root in self.held if (name := _block(root.node)) is not None)
        ordered = sorted(names, key=lambda name: int(name.split(".")[1]))
        return ordered[:-1]

    def _inside(self, blocks: Iterable[str]) -> set[Tensor]:
        """What these blocks make and keep but what the next block begins with."""
        wanted, readers = set(blocks), self.graph.readers()
        found: set[Tensor] = set()
        for root in self.held:
            block = _block(root.node)
            if block in wanted and root.node.op.pure:
                forward = [n for t in self.family[root] for n in readers.get(t, ()) if n.id < self.start]
                if all(_block(node) == block for node in forward) or self._remade(root):
                    found.add(root)
        return found

    def _remade(self, root: Tensor) -> bool:
        return root.node.op.name in NORMS and root is not root.node.outputs[0]

    def _boundaries(self, blocks: Iterable[str]) -> set[Tensor]:
        wanted, inside = set(blocks), self._inside(blocks)
        return {
            root
            for root in self.held
            if _block(root.node) in wanted
            and root not in inside
            and root.node.op is not INPUT
            and root.nbytes > 1 << 12
        }

    def changed(self, cheap: Iterable[Tensor], blocks: Iterable[str] = (), moved: Iterable[str] = ()) -> Graph:
        chosen = set(cheap) | self._inside(blocks)
        again = {tensor for root in chosen for tensor in self.family[root]}
        return prune(_Again(self, again, self._boundaries(moved)).run())

    def told(self, cheap: Iterable[Tensor], blocks: Iterable[str] = (), moved: Iterable[str] = ()) -> list[Decision]:
        inside = self._inside(blocks)
        by_op: dict[str, list[Tensor]] = {}
        for root in cheap:
            if root not in inside:
                by_op.setdefault(root.node.op.name, []).append(root)
        told = [_decision("recompute", f"{name} x {len(roots)}", roots) for name, roots in by_op.items()]
        told += [_decision("recompute", block, self._inside([block])) for block in blocks]
        return told + [_decision("offload", block, self._boundaries([block]), flops=0) for block in moved]


def _decision(what: str, of: str, roots: Iterable[Tensor], *, flops: int | None = None) -> Decision:
    given = list(roots)
    nodes = {root.node for root in given}
    cost = sum(node.op.cost(node).flops for node in nodes) if flops is None else flops
    return Decision(what, of, sum(root.nbytes for root in given), cost)


class _Again(Replay):
    """Replays a step; backward nodes that read a value of `again` read one that was made once more, right before."""

    def __init__(self, step: _Step, again: set[Tensor], moved: set[Tensor]) -> None:
        super().__init__(step.graph)
        self.step, self.again, self.moved = step, again, moved
        self.remade: dict[Tensor, Tensor] = {}
        self.away: dict[Tensor, Tensor] = {}
        self.behind = False

    def visit(self, node: Node) -> None:
        self.behind = node.id >= self.step.start
        self.copy(node)
        for out in node.outputs:
            if not self.behind and out in self.moved:
                made = self.map[out]
                assert made is not None
                self.away[out] = OPS["to_host"](made)

    def inputs(self, node: Node) -> tuple[Tensor | None, ...]:
        if not self.behind:
            return super().inputs(node)
        return tuple(None if tensor is None else self._value(tensor) for tensor in node.inputs)

    def _value(self, tensor: Tensor) -> Tensor:
        if tensor.node.id < self.step.start and tensor not in self.remade:
            if tensor in self.again:
                self._make(tensor)
            elif tensor in self.moved:
                self.remade[tensor] = OPS["from_host"](self.away[tensor])
            elif self.step.root[tensor] in self.moved:
                self._make(tensor)
        made = self.remade.get(tensor, self.map[tensor])
        assert made is not None
        return made

    def _make(self, tensor: Tensor) -> None:
        node = tensor.node
        if node.op.name in NORMS and tensor is not node.outputs[0] and node.outputs[0] not in self.again:
            total = self._value(node.outputs[0])
            attrs = {key: value for key, value in node.attrs.items() if key != "factor"}
            parameters = [None if t is None else self._value(t) for t in node.inputs[2:]]
            OPS[NORMS[node.op.name]](total, *parameters, **attrs)
            made = (total, *self.graph.nodes[-1].outputs)
        else:
            given = tuple(None if t is None else self._value(t) for t in node.inputs)
            made = self.graph.add(node.op, given, node.attrs, tuple(t.spec for t in node.outputs))
        for old, new in zip(node.outputs, made, strict=True):
            self.remade.setdefault(old, new)
