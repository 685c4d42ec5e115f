"""Fusion, before gradients are taken: what a layer writes as several ops becomes the one that a fast backend has.

Every pattern is exact algebra over the same numbers; only roundings between ops go away. A pattern is applied where the
backend has the op. The fused ops have VJPs of their own, so that the backward pass is fused by construction.

    linears     products of one tensor with several weights: one product with the stacked weight, then views
    norms       x + f * delta and the norm of that sum
    ropes       the norms of a layer's query and key heads and their rotation
    attentions  attention and the mask that was made for it: the mask is never made
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from smedjan.graph.node import INPUT, Graph, Node
from smedjan.graph.op import OPS
from smedjan.graph.rewrite import Replay, prune
from smedjan.graph.tensor import Tensor
from smedjan.ops.attention import swap_heads
from smedjan.ops.fp8 import fp8_linear
from smedjan.ops.lora import lora_linear
from smedjan.ops.shape import split

Has = Callable[[str], bool]
New = Callable[[Tensor], Tensor]

MADE = ("nf4_dequantize", "int8_dequantize", "affine_dequantize")
"""What makes weights in the graph, of fewer bits."""


@dataclass(frozen=True)
class Match:
    """`build(new)` gives the replacements of old tensors, made where `at` stood; `covers` are left out."""

    at: Node
    covers: frozenset[Node]
    build: Callable[[New], dict[Tensor, Tensor]]


class Rewrite(Replay):
    """Replays a graph with matches in the place of what they cover. Inputs come first, so that a match finds them."""

    def __init__(self, source: Graph, matches: Iterable[Match]) -> None:
        super().__init__(source)
        self.at = {match.at: match for match in matches}
        self.covered = {node for match in self.at.values() for node in match.covers}

    def run(self, nodes: Iterable[Node] | None = None) -> Graph:
        given = list(self.source.nodes if nodes is None else nodes)
        inputs = [node for node in given if node.op is INPUT]
        return super().run([*inputs, *(node for node in given if node.op is not INPUT)])

    def visit(self, node: Node) -> None:
        if node in self.at:
            self.map.update(self.at[node].build(self._new))
        elif node not in self.covered:
            self.copy(node)

    def _new(self, tensor: Tensor) -> Tensor:
        made = self.map[tensor]
        assert made is not None
        return made


def fuse(graph: Graph, has: Has) -> Graph:
    """The forward graph with every pattern of this module applied that `has` the op for."""
    for find in (_plain, _linears, _norms, _ropes, _attentions):
        matches = list(find(graph, has))
        if matches:
            graph = prune(Rewrite(graph, matches).run())
    return graph


def only_reader(tensor: Tensor, readers: dict[Tensor, list[Node]], outputs: set[Tensor]) -> Node | None:
    """The node that alone reads a tensor which is no output, else None."""
    found = readers.get(tensor, [])
    return found[0] if len(found) == 1 and tensor not in outputs else None


def _plain(graph: Graph, has: Has) -> Iterable[Match]:
    """Copies that only an exact backend's strides need, and slices that cut a tensor up completely: one split."""
    slices: dict[Tensor, list[Node]] = {}
    for node in graph.nodes:
        if node.op.name == "contiguous":
            yield _renamed(node)
        if node.op.name == "slice_last":
            slices.setdefault(_input(node, 0), []).append(node)
    for tensor, nodes in slices.items():
        ordered = sorted(nodes, key=lambda node: node.attrs["start"])
        ends = [0, *(node.attrs["stop"] for node in ordered)]
        if len(nodes) > 1 and [node.attrs["start"] for node in ordered] == ends[:-1] and ends[-1] == tensor.shape[-1]:
            yield _split(tensor, ordered)


def _renamed(node: Node) -> Match:
    return Match(node, frozenset((node,)), lambda new: {node.outputs[0]: new(_input(node, 0))})


def _split(tensor: Tensor, ordered: list[Node]) -> Match:
    first = min(ordered, key=lambda node: node.id)

    def build(new: New) -> dict[Tensor, Tensor]:
        sizes = tuple(node.outputs[0].shape[-1] for node in ordered)
        parts = split(new(tensor), sizes=sizes, dim=-1)
        return {node.outputs[0]: part for node, part in zip(ordered, parts, strict=True)}

    return Match(first, frozenset(ordered), build)


def _linears(graph: Graph, has: Has) -> Iterable[Match]:
    """Linear layers of one tensor in one module (a scope): q, k and v, or gate and up, with their adapters. Those in
    8-bit floats are groups of their own. A parameter is in one group at most, the first: it lies in memory for that."""
    found: dict[tuple[Tensor, str, bool, Any], list[Node]] = {}
    for node in graph.nodes:
        if node.op.name not in ("linear", "lora_linear", "fp8_linear"):
            continue
        weight = _input(node, 1)
        kind = "input" if weight.node.op is INPUT else weight.node.op.name
        if node.op is fp8_linear:
            kind = fp8_linear.name
        if kind in ("input", *MADE, fp8_linear.name):
            key = (_input(node, 0), node.scope, node.inputs[2] is not None, kind)
            found.setdefault(key, []).append(node)
    taken: set[Tensor] = set()
    for (_, _, biased, kind), readers in found.items():
        nodes = [node for node in readers if _input(node, 1) not in taken]
        adapted = any(node.op is lora_linear for node in nodes)
        if (
            adapted
            and has("lora_linear_group")
            and len({(n.attrs["scaling"], _input(n, 3).shape[0]) for n in nodes if n.op is lora_linear}) == 1
        ):
            if len(nodes) > 1:
                taken.update(_input(node, 1) for node in nodes)
                yield _group(nodes, biased, adapted=True, together=kind == "input")
        elif not adapted and len(nodes) > 1 and kind not in MADE and has(f"{nodes[0].op.name}_group"):
            taken.update(_input(node, 1) for node in nodes)
            yield _group(nodes, biased, adapted=False, together=True)


def _group(nodes: list[Node], biased: bool, *, adapted: bool, together: bool) -> Match:
    x = _input(nodes[0], 0)
    # Weights that are made in the graph (from quantized ones) are made where the group is, before the first member.
    makers = [_input(node, 1).node for node in nodes] if not together else []

    def build(new: New) -> dict[Tensor, Tensor]:
        tensors = [_weight(_input(node, 1), new) for node in nodes]
        sizes = tuple(weight.shape[0] for weight in tensors)
        if biased:
            tensors += [new(_input(node, 2)) for node in nodes]
        if adapted:
            with_adapter = [node for node in nodes if node.op is lora_linear]
            tensors += [new(_input(node, 3)) for node in with_adapter] + [new(_input(node, 4)) for node in with_adapter]
            y = OPS["lora_linear_group"](
                new(x),
                *tensors,
                adapted=tuple(node.op is lora_linear for node in nodes),
                biased=biased,
                together=together,
                scaling=with_adapter[0].attrs["scaling"],
            )
        else:
            y = OPS[f"{nodes[0].op.name}_group"](new(x), *tensors, biased=biased)
        parts = split(y, sizes=sizes, dim=-1)
        return {node.outputs[0]: part for node, part in zip(nodes, parts, strict=True)}

    return Match(nodes[0], frozenset((*nodes, *makers)), build)


def _weight(weight: Tensor, new: New) -> Tensor:
    maker = weight.node
    if maker.op is INPUT:
        return new(weight)
    return maker.op(*(None if tensor is None else new(tensor) for tensor in maker.inputs), **maker.attrs)


def _norms(graph: Graph, has: Has) -> Iterable[Match]:
    """add, then the first norm that reads the sum. Where one operand is a scaled tensor, its factor goes along."""
    readers, outputs = graph.readers(), set(graph.outputs.values())
    for node in graph.nodes:
        if node.op.name != "add" or _input(node, 0).spec != _input(node, 1).spec:
            continue
        norm = next((r for r in readers.get(node.outputs[0], ()) if r.op.name in ("rms_norm", "layer_norm")), None)
        if norm is None or not has(f"add_{norm.op.name}") or norm.inputs[0] is not node.outputs[0]:
            continue
        x, delta, factor, covers = _input(node, 0), _input(node, 1), 1.0, {node, norm}
        if delta.node.op.name != "scale" and x.node.op.name == "scale":
            x, delta = delta, x
        if delta.node.op.name == "scale" and only_reader(delta, readers, outputs) is node:
            covers.add(delta.node)
            factor, delta = delta.node.attrs["factor"], _input(delta.node, 0)
        yield _add_norm(node, norm, x, delta, factor, frozenset(covers))


def _add_norm(add: Node, norm: Node, x: Tensor, delta: Tensor, factor: float, covers: frozenset[Node]) -> Match:
    def build(new: New) -> dict[Tensor, Tensor]:
        parameters = (None if tensor is None else new(tensor) for tensor in norm.inputs[1:])
        total, y = OPS[f"add_{norm.op.name}"](new(x), new(delta), *parameters, factor=factor, **norm.attrs)
        return {add.outputs[0]: total, norm.outputs[0]: y}

    return Match(add, covers, build)


@dataclass(frozen=True)
class _Heads:
    """The query or key heads that one rope turns: `raw` before their norm (`norm` None: they have none)."""

    rope: Node
    raw: Callable[[New], Tensor]
    last: int
    norm: Node | None
    covers: tuple[Node, ...]


def _ropes(graph: Graph, has: Has) -> Iterable[Match]:
    """The two rotations of a layer, of q and of k, with the norms of the heads."""
    if not has("qk_norm_rope"):
        return
    readers, outputs = graph.readers(), set(graph.outputs.values())
    ropes = [node for node in graph.nodes if node.op.name == "rope"]
    pairs = zip(ropes[::2], ropes[1::2], strict=True)
    for q, k in pairs:
        if q.scope != k.scope or q.inputs[1:] != k.inputs[1:] or q.attrs != k.attrs:
            continue
        heads = [_heads(node, readers, outputs) for node in (q, k)]
        norms = [each.norm for each in heads if each.norm is not None]
        if len(norms) == 1 or (norms and norms[0].attrs != norms[1].attrs):
            heads, norms = [_Heads(n, _same(_input(n, 0)), _input(n, 0).node.id, None, (n,)) for n in (q, k)], []
        if max(each.last for each in heads) < q.id:
            yield _qk_rope(q, heads, norms)


def _same(tensor: Tensor) -> Callable[[New], Tensor]:
    return lambda new: new(tensor)


def _heads(rope: Node, readers: dict[Tensor, list[Node]], outputs: set[Tensor]) -> _Heads:
    """rms_norm of [B, H, T, D], or of [B, T, H, D] whose heads are then moved to the front."""
    x = _input(rope, 0)
    node = x.node
    if node.op.name == "rms_norm" and only_reader(x, readers, outputs) is rope:
        raw = _input(node, 0)
        return _Heads(rope, _same(raw), raw.node.id, node, (node, rope))
    if node.op is swap_heads and only_reader(x, readers, outputs) is rope:
        normed = _input(node, 0)
        norm = normed.node
        if norm.op.name == "rms_norm" and only_reader(normed, readers, outputs) is node:
            raw = _input(norm, 0)
            return _Heads(rope, lambda new: swap_heads(new(raw)), raw.node.id, norm, (norm, node, rope))
    return _Heads(rope, _same(x), node.id, None, (rope,))


def _qk_rope(at: Node, heads: list[_Heads], norms: list[Node]) -> Match:
    def build(new: New) -> dict[Tensor, Tensor]:
        q, k = (each.raw(new) for each in heads)
        weights: list[Tensor | None] = [new(_input(norm, 1)) for norm in norms] or [None, None]
        attrs = {**at.attrs, **(norms[0].attrs if norms else {})}
        turned = OPS["qk_norm_rope"](q, k, *weights, *(new(_input(at, index)) for index in (1, 2)), **attrs)
        return {each.rope.outputs[0]: out for each, out in zip(heads, turned, strict=True)}

    return Match(at, frozenset(node for each in heads for node in each.covers), build)


def _attentions(graph: Graph, has: Has) -> Iterable[Match]:
    for node in graph.nodes:
        if node.op.name != "attention":
            continue
        k = _input(node, 1)
        if k.node.op.name == "kv_read":
            if has("cached_attention"):
                yield _cached(node)
        elif has("flash_attention"):
            yield _flash(node)


def _mask(node: Node) -> tuple[str, Tensor | None, int]:
    """(kind, the tensor that a mask was made of, window)"""
    mask = node.inputs[3]
    if mask is None:
        return ("causal" if node.attrs["causal"] else "none"), None, 0
    made = mask.node
    assert made.op.name in ("causal_mask", "padding_mask", "document_mask"), f"a mask by {made.op.name}"
    kind = {"causal_mask": "causal", "padding_mask": "padded", "document_mask": "packed"}[made.op.name]
    return kind, made.inputs[0] if kind != "causal" else None, made.attrs["window"]


def _flash(node: Node) -> Match:
    kind, source, window = _mask(node)

    def build(new: New) -> dict[Tensor, Tensor]:
        q, k, v = (new(_input(node, index)) for index in range(3))
        key_mask = new(source) if kind == "padded" and source is not None else None
        start = end = None
        if kind == "packed" and source is not None:
            start, end = OPS["document_bounds"](new(source))
        y = OPS["flash_attention"](
            q,
            k,
            v,
            key_mask,
            start,
            end,
            None,
            scale=node.attrs["scale"],
            causal=kind != "none",
            window=window,
            cap=node.attrs["cap"],
        )
        return {node.outputs[0]: y}

    return Match(node, frozenset((node,)), build)


def _cached(node: Node) -> Match:
    kind, source, window = _mask(node)
    read = _input(node, 1).node
    assert kind != "packed", "packed rows have no cache"

    def build(new: New) -> dict[Tensor, Tensor]:
        q = new(_input(node, 0))
        caches = [new(_input(_input(node, index).node, 0)) for index in (1, 2)]
        y = OPS["cached_attention"](
            q,
            *caches,
            new(source) if kind == "padded" and source is not None else None,
            new(_input(read, 1)),
            None,
            scale=node.attrs["scale"],
            window=window or read.attrs["window"],
            cap=node.attrs["cap"],
        )
        return {node.outputs[0]: y}

    return Match(node, frozenset((node,)), build)


def _input(node: Node, index: int) -> Tensor:
    tensor = node.inputs[index]
    assert tensor is not None, f"{node.op.name} without input {index}"
    return tensor
