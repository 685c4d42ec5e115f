"""Where our computation and transformers' part: the first layer and op, by dataflow.

On the exact backend every value of ours is one that transformers made too, to the bit, save for moves (a cache with
room to spare, a slice of fused weights), masks, and tables in another layout. So a value is *good* if transformers made
its bytes, or if it only moves or widens good values, or is a mask, or is a table all of whose numbers stand in one
tensor of transformers'. A case fails through a path of bad values that ends at an output; where that path begins, at a
node whose inputs are all good, the two part. A mask is never blamed: the attention that reads it is, in the first layer
where it matters.

Both sides run twice, once for digests and once for the distance, so that nothing but a table is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from smedjan.data.collate import Batch
from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.tensor import FLOATS, ITEMSIZE, Tensor
from smedjan.hf.peer import Feed, Peer, feeds
from smedjan.hf.watch import Parted, Watched, backward, behind, decoded, layer_of, module_of, op_of, run, ulps
from smedjan.runtime.session import Session

TABLE = 1 << 22
"""Elements of the largest table that is compared by its set of numbers."""


@dataclass
class _Ours:
    """What one run of our program made: a digest of each tensor (None where the backend made none)."""

    graph: Graph = field(default_factory=Graph)
    keys: dict[Tensor, Any] = field(default_factory=dict)
    moves: set[Node] = field(default_factory=set)
    of_positions: set[Node] = field(default_factory=set)
    tables: dict[Tensor, Any] = field(default_factory=dict)


def bisect(session: Session, peer: Peer, batch: Batch, mode: str, *, prefills: tuple[int, ...] = ()) -> Parted | None:
    """The first layer and op where `session` (exact) leaves `peer`, or None where it does not.

    mode: "logits", "gradients" or "decode" (a prefill of each length in `prefills`, by default of the whole batch).
    """
    assert session.backend.exact, "fast backends have no bits to compare: see bisect_bound"
    assert peer.attention == session.attention, (peer.attention, session.attention)
    watched, script = Watched.of(session), []
    if mode == "decode":
        script = _until_they_differ(session, peer, list(feeds(batch, prefills or (batch.input_ids.shape[1],))))
        if not script:
            return None
    ours = _record(watched, batch, mode, script)
    made: dict[Any, int] = {}
    with_tables = dict.fromkeys(ours.tables, False)
    _theirs(peer, batch, mode, script, lambda number, call: made.setdefault(call.key, number))
    wrong = _wrong(ours, made, with_tables)
    if any(tensor in wrong for tensor in with_tables):
        _look_for_tables(peer, batch, mode, script, ours, with_tables)
        wrong = _wrong(ours, made, with_tables)
    first = _first(ours.graph, wrong)
    if first is None:
        return None
    after = max((made.get(ours.keys.get(tensor), -1) for tensor in first.node.inputs if tensor is not None), default=-1)
    ulp, nearest = _distance(watched, peer, batch, mode, script, first, after)
    return Parted(
        layer=_layer(first, ours, wrong),
        behind=behind(first.node, ours.graph),
        op=op_of(first.node),
        primitive=first.node.op.name,
        module=module_of(first.node, session.parameters),
        backward=backward(first.node),
        ulp=ulp,
        peer=nearest,
    )


def _until_they_differ(session: Session, peer: Peer, script: Sequence[Feed]) -> list[Feed]:
    """The feeds of one text up to the first whose logits differ; [] where none do."""
    text: list[Feed] = []
    for feed, logits in decoded(session, script):
        text = [feed] if feed.fresh else [*text, feed]
        raw = session.backend.to_raw(logits)
        theirs = peer.feed(feed)
        if _float32(logits).tobytes() != theirs.tobytes() or raw.shape != theirs.shape:
            return text
    return []


def _float32(tensor: Any) -> Any:
    from smedjan.hf import peer_trace

    return peer_trace.float32(tensor)


def _record(session: Watched, batch: Batch, mode: str, script: Sequence[Feed]) -> _Ours:
    from smedjan.hf import peer_trace

    ours, computed = _Ours(), [False]

    def began(graph: Graph) -> None:
        ours.graph, ours.of_positions, computed[0] = graph, _of_positions(graph), False

    def called(call: peer_trace.Call) -> None:
        computed[0] |= not call.moves

    def see(node: Node, outputs: tuple[Any, ...]) -> None:
        if not computed[0]:
            ours.moves.add(node)
        for tensor, value in zip(node.outputs, outputs, strict=True):
            ours.keys[tensor] = None if value is None else peer_trace.key(value)
            if tensor.dtype in FLOATS and tensor.numel <= TABLE and node in ours.of_positions:
                ours.tables[tensor] = value.clone()
        computed[0] = False

    session.began = began
    with peer_trace.Trace(called):
        run(session, batch, mode, script, see)
    return ours


def _of_positions(graph: Graph) -> set[Node]:
    """The nodes that no number of a float input enters: those that make tables and masks."""
    found: set[Node] = set()
    for node in graph:
        if node.op is INPUT:
            of_positions = node.outputs[0].dtype not in FLOATS
        else:
            of_positions = all(tensor is None or tensor.node in found for tensor in node.inputs)
        if of_positions:
            found.add(node)
    return found


def _theirs(peer: Peer, batch: Batch, mode: str, script: Sequence[Feed], see: Callable[[int, Any], object]) -> None:
    """`see(number, call)` for every tensor that transformers makes in this mode (in the script's last feed), save for
    views of its weights."""
    from smedjan.hf import peer_trace

    weights = {parameter.data_ptr() for parameter in peer.model.parameters()}
    count = 0

    def called(call: peer_trace.Call) -> None:
        nonlocal count
        if not call.moves or call.tensor.data_ptr() not in weights:
            see(count, call)
        count += 1

    for feed in script[:-1]:
        peer.feed(feed)
    with peer_trace.tracing(peer.model, called):
        if script:
            peer.feed(script[-1])
        else:
            peer.backward(batch, gradients=mode == "gradients")


def _wrong(ours: _Ours, made: dict[Any, int], tables: dict[Tensor, bool]) -> set[Tensor]:
    """The tensors that are not good."""
    wrong: set[Tensor] = set()
    for node in ours.graph.live_nodes():
        if node.op is INPUT:
            continue
        inputs = [tensor for tensor in node.inputs if tensor is not None]
        tainted = any(tensor in wrong for tensor in inputs)
        mask = all(tensor.dtype == "bool" for tensor in inputs) and bool(inputs)
        # torch's kernels promote a narrow operand unseen, where our graph says so.
        same = mask or node in ours.moves or _widens(node)
        for tensor in node.outputs:
            key = ours.keys[tensor]
            if key is None or key in made:
                continue
            excused = same or tensor.dtype == "bool" or tables.get(tensor, False)
            if tainted or not excused:
                wrong.add(tensor)
    return wrong


def _widens(node: Node) -> bool:
    source = node.inputs[0] if node.op.name == "_cast" else None
    return source is not None and ITEMSIZE[node.outputs[0].dtype] > ITEMSIZE[source.dtype]


def _look_for_tables(
    peer: Peer, batch: Batch, mode: str, script: Sequence[Feed], ours: _Ours, found: dict[Tensor, bool]
) -> None:
    """Marks the tables whose numbers all stand in one tensor of transformers'."""
    import numpy as np

    from smedjan.hf import peer_trace

    sets = {tensor: peer_trace.bits(value) for tensor, value in ours.tables.items()}

    def see(_number: int, call: peer_trace.Call) -> None:
        dtype, size = call.kind
        for tensor, numbers in sets.items():
            if not found[tensor] and dtype == f"torch.{tensor.dtype}" and len(numbers) <= size <= TABLE:
                found[tensor] = bool(np.isin(numbers, peer_trace.bits(call.tensor)).all())

    _theirs(peer, batch, mode, script, see)


def _first(graph: Graph, wrong: set[Tensor]) -> Tensor | None:
    """The first wrong tensor of right inputs from which a path of wrong ones leads to an output."""
    reached = {tensor for tensor in graph.outputs.values() if tensor in wrong}
    for node in reversed(graph.nodes):
        if any(tensor in reached for tensor in node.outputs):
            reached.update(tensor for tensor in node.inputs if tensor is not None and tensor in wrong)
    for node in graph.nodes:
        begins = not any(tensor in wrong for tensor in node.inputs)
        for tensor in node.outputs:
            if begins and tensor in reached:
                return tensor
    return None


def _layer(first: Tensor, ours: _Ours, wrong: set[Tensor]) -> int | None:
    """The layer of its node; of a table, that of the first node that reads it, or reads what was made of it."""
    layer = layer_of(first.node)
    if layer is not None or first.node not in ours.of_positions:
        return layer
    spread = {first}
    for node in ours.graph:
        if any(tensor in spread for tensor in node.inputs):
            if layer_of(node) is not None:
                return layer_of(node)
            spread.update(tensor for tensor in node.outputs if tensor in wrong)
    return None


def _distance(
    session: Watched, peer: Peer, batch: Batch, mode: str, script: Sequence[Feed], first: Tensor, after: int
) -> tuple[int | None, str]:
    """(ulp, what made it) of the value nearest to `first` that transformers computed after call number `after`."""
    from smedjan.hf import peer_trace

    if first.dtype not in FLOATS:
        return None, ""
    held: list[Any] = []

    def keep(node: Node, outputs: tuple[Any, ...]) -> None:
        if node is first.node:
            held.append(outputs[first.index].clone())

    run(session, batch, mode, script, keep)
    ours, wanted = peer_trace.float32(held[0]), (str(held[0].dtype), held[0].numel())
    best: tuple[int, str] | None = None

    def see(number: int, call: peer_trace.Call) -> None:
        nonlocal best
        if number <= after or call.moves or call.kind != wanted:
            return
        far = ulps(ours, peer_trace.float32(call.tensor), first.dtype)
        if best is None or far < best[0]:
            best = (far, f"{call.op} in {call.module}" if call.module else call.op)

    _theirs(peer, batch, mode, script, see)
    return best or (None, "")
