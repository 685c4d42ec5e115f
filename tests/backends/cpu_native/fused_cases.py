"""Every fused op as a small graph with gradients, run three ways: fast, plain and in float64.

`plain` is torch_reference in the dtype under test; the reference is the same decomposed graph with every cast made a
widening to float64, so that it has no rounding that the bounds of tests/tolerances.py would have to know of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor as Array

from smedjan.backends.torch_reference import RULES as ATEN
from smedjan.backends.torch_reference import TorchReference
from smedjan.graph.grad import grad
from smedjan.graph.lowering import RuleTable
from smedjan.graph.node import Graph
from smedjan.graph.program import Program
from smedjan.graph.rewrite import cse, decompose, prune
from smedjan.graph.tensor import Tensor
from smedjan.ops import attention as att
from smedjan.ops.activation import ACTIVATIONS, gelu_new, relu2
from smedjan.ops.elementwise import add
from smedjan.ops.glu import glu
from smedjan.ops.linear import linear, linear_group
from smedjan.ops.lora import lora_linear, lora_linear_group
from smedjan.ops.loss import GRADIENTS_IN_FORWARD, linear_cross_entropy, linear_kl, linear_log_probs
from smedjan.ops.norm import add_rms_norm, layer_norm, rms_norm
from smedjan.ops.rope import qk_norm_rope, rope
from smedjan.ops.shape import concat
from tests.tolerances import UNIT_ROUNDOFF, assert_close

WIDE = RuleTable("float64", parent=ATEN)


@WIDE.rule("_cast")
def _widen(x: Array, *, dtype: str) -> Array:
    return x.double()


@WIDE.rule("ones")
def _one(*, dtype: str) -> Array:
    return torch.ones((), dtype=torch.float64)


@WIDE.rule("int8_dequantize")
def _product(codes: Array, scale: Array, *, dtype: str) -> Array:
    return codes.double() * scale.double()[:, None]


class Float64(TorchReference):
    """The exact backend over float64 arrays, whatever dtype a graph declares."""

    name = "float64"
    rules = WIDE


@dataclass(frozen=True)
class Case:
    """`build` makes y from the inputs in `arrays`' order. Gradients of sum(y * dy), of y itself where `seeded` is no.

    Arrays named in `kept` keep float32 whatever the dtype under test; the others' values are rounded to it. `terms` is
    the size of the logits of which a scalar y is a difference.
    """

    build: Callable[..., Tensor]
    arrays: dict[str, Array]
    wrt: tuple[str, ...] = ()
    seeded: bool = True
    kept: tuple[str, ...] = ()
    terms: float = 0.0

    def values(self, dtype: torch.dtype) -> dict[str, Array]:
        return {
            name: array.to(dtype) if array.is_floating_point() and name not in self.kept else array
            for name, array in self.arrays.items()
        }

    def program(self, rules: RuleTable, dtype: torch.dtype, *, exact: bool) -> Program:
        graph = Graph()
        for name, array in self.values(dtype).items():
            graph.input(name, tuple(array.shape), str(array.dtype).removeprefix("torch."))
        graph.output("y", self.build(*graph.inputs.values()))
        # As a session does: a gradient that was saved in the forward is that of a rule.
        graph = decompose(graph, rules.has if exact else lambda n: n.op not in GRADIENTS_IN_FORWARD or rules.has(n))
        y = graph.outputs["y"]
        if self.wrt:
            seeds = {y: graph.input("dy", y.shape, y.dtype)} if self.seeded else None
            found = grad(y, [graph.inputs[name] for name in self.wrt], seeds=seeds)
            for name, gradient in zip(self.wrt, found, strict=True):
                assert gradient is not None
                graph.output(f"d{name}", gradient)
        return Program(cse(prune(decompose(graph, rules.has))), rules)

    def check(self, rules: RuleTable, op: str, dtype: torch.dtype) -> None:
        """The table keeps `op` fused, and y and every gradient are within the bound."""
        fast = self.program(rules, dtype, exact=False)
        assert op in {call.node.op.name for call in fast.calls}
        plain = self.program(ATEN, dtype, exact=True)
        wide = self.program(WIDE, dtype, exact=True)
        inputs = self.values(dtype)
        if self.wrt and self.seeded:
            y = plain.graph.outputs["y"]
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
            inputs["dy"] = dy.to(getattr(torch, y.dtype)).to(next(iter(inputs.values())).device)
        widened = {name: array.double() if array.is_floating_point() else array for name, array in inputs.items()}
        before = {name: array.clone() for name, array in inputs.items()}
        expected, torchs, found = wide(widened), plain(inputs), fast(inputs)
        assert found.keys() == expected.keys()
        for name, reference in expected.items():
            assert found[name].dtype == torchs[name].dtype, name
            scale = None
            if reference.ndim == 0:
                # The loss is float32, and of logits that are rounded to `dtype`: a single draw of their errors.
                scale = max(float(reference.abs()), self.terms) * UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF[torch.float32]
            assert_close(name, found[name], reference, torchs[name], scale=scale)
        for name, array in before.items():
            assert torch.equal(array, inputs[name]), f"{name} was written to"


_generator = torch.Generator().manual_seed(20261124)


def normal(*shape: int, scale: float = 1.0) -> Array:
    return torch.randn(shape, generator=_generator) * scale


def _norm(rows: int, dim: int, when: str, wrt: str, *, waits: bool, offset: float = 0.0) -> Case:
    """`waits`: x is read after the norm too, so that a cotangent waits at x: `acc`."""

    def build(x: Tensor, w: Tensor) -> Tensor:
        y = rms_norm(x, w, eps=1e-5, weight_cast=when, offset=offset)
        return add(x, y) if waits else y

    return Case(build, {"x": normal(2, rows, dim), "w": 1 + normal(dim, scale=0.2)}, tuple(wrt))


def _layer_norm(rows: int, dim: int, wrt: str, *, biased: bool = True, composed: bool = False) -> Case:
    arrays = {"x": 2 + normal(2, rows, dim), "w": 1 + normal(dim, scale=0.2)} | ({"b": normal(dim)} if biased else {})

    def build(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return layer_norm(x, w, b, eps=1e-5, composed=composed)

    return Case(build, arrays, tuple(wrt))


def _head_norm(dim: int) -> Case:
    """Of heads that were moved to the front: rows that do not follow each other."""

    def build(x: Tensor, w: Tensor) -> Tensor:
        return att.merge_heads(rms_norm(att.split_heads(x, heads=3), w, eps=1e-5))

    return Case(build, {"x": normal(2, 5, 3 * dim), "w": normal(dim)}, ("x", "w"))


def _rope(dim: int, batch: int, *, width: int = 0, **attrs: Any) -> Case:
    """cos and sin of one row for all, or of a row each; `width` of a head, whose first `dim` are turned."""
    angles = normal(batch, 1, 5, dim // 2, scale=2.0)
    angles = angles.repeat_interleave(2, dim=-1) if attrs.get("interleaved") else angles.repeat(1, 1, 1, 2)
    arrays = {"x": normal(2, 3, 5, width or dim), "cos": angles.cos(), "sin": angles.sin()}
    kept = ("cos", "sin") if attrs.get("upcast") == "terms" else ()
    return Case(lambda x, cos, sin: rope(x, cos, sin, **attrs), arrays, ("x",), kept=kept)


def _attention(heads: int, groups: int, seq: int, dim: int, mask: str, *, window: int = 0) -> Case:
    arrays = {"q": normal(2, heads, seq, dim), "k": normal(2, groups, seq, dim), "v": normal(2, groups, seq, dim)}
    if mask == "padded":
        arrays["m"] = torch.ones(2, seq, dtype=torch.bool)
        arrays["m"][0, -2:] = False
    if mask == "packed":
        arrays["m"] = torch.tensor([[0] * 2 + [1] * (seq - 2), [0] * (seq - 1) + [1]])

    def build(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Tensor:
        if m is not None:
            m = _mask(m, mask, seq, window)
        return att.attention(q, k, v, m, causal=mask == "causal", scale=dim**-0.5)

    return Case(build, arrays, ("q", "k", "v"))


def _mask(m: Tensor, kind: str, seq: int, window: int) -> Tensor:
    return att.padding_mask(m, queries=seq, window=window) if kind == "padded" else att.document_mask(m, window=window)


def _loss(
    grads: str, *, rows: int = 5, seeded: bool = False, ignored: bool = False, size: float = 1.0, **shaping: float
) -> Case:
    """`size`: of the logits, beside a cap."""
    labels = torch.randint(17, (rows,), generator=_generator)
    labels[1::3] = -100
    if ignored:
        labels[:] = -100
    arrays = {"x": normal(rows, 7, scale=size), "w": normal(17, 7), "labels": labels, "n": torch.tensor(3.0)}

    def build(*inputs: Tensor) -> Tensor:
        return linear_cross_entropy(*inputs, grads=grads, **shaping)

    return Case(build, arrays, tuple(grads), seeded, kept=("n",))


def _kl(grads: str, *, rows: int = 5, seeded: bool = False, **attrs: Any) -> Case:
    """A teacher of another width."""
    labels = torch.zeros(rows, dtype=torch.int64)
    labels[1::3] = -100
    arrays = {"x": normal(rows, 7, scale=0.4), "w": normal(17, 7), "t": normal(rows, 4, scale=0.5), "u": normal(17, 4)}

    def build(*inputs: Tensor) -> Tensor:
        return linear_kl(*inputs, grads=grads, **attrs)

    terms = float((arrays["x"] @ arrays["w"].T).abs().max() + (arrays["t"] @ arrays["u"].T).abs().max())
    arrays |= {"labels": labels, "n": torch.tensor(3.0)}
    return Case(build, arrays, tuple(grads), seeded, kept=("n",), terms=terms)


def _log_probs(wrt: str, *, rows: int = 5, **shaping: float) -> Case:
    labels = torch.randint(17, (rows,), generator=_generator)
    labels[1::3] = -100
    arrays = {"x": normal(rows, 7), "w": normal(17, 7), "labels": labels}
    return Case(lambda *inputs: linear_log_probs(*inputs, **shaping), arrays, tuple(wrt))


def _heads() -> dict[str, tuple[str, Case]]:
    made: dict[str, tuple[str, Case]] = {}
    for grads in ("", "x", "xw"):
        for name, shaping in {"": {}, " shaped": {"scaling": 0.7, "divisor": 1.3, "cap": 4.0}}.items():
            for told, terms in {
                "z-loss": {"z_loss": 0.05},
                "smoothed": {"smoothing": 0.1},
                "both": {"z_loss": 0.05, "smoothing": 0.3},
            }.items():
                case = _loss(grads, **terms, **shaping)
                made[f"linear_cross_entropy {told}{name} {grads or 'none'}"] = ("linear_cross_entropy", case)
    terms = {"z_loss": 0.05, "smoothing": 0.1}
    made["linear_cross_entropy both, cotangent"] = ("linear_cross_entropy", _loss("xw", seeded=True, **terms))
    made["linear_cross_entropy both, ignored"] = ("linear_cross_entropy", _loss("xw", ignored=True, **terms))
    for direction in ("forward", "reverse"):
        for grads in ("", "x", "w", "xw"):
            made[f"linear_kl {direction} {grads or 'none'}"] = ("linear_kl", _kl(grads, direction=direction))
        attrs: dict[str, Any] = {"direction": direction, "temperature": 2.0, "cap": 3.0, "teacher_divisor": 1.3}
        made[f"linear_kl {direction} shaped"] = ("linear_kl", _kl("xw", **attrs))
        made[f"linear_kl {direction}, cotangent"] = ("linear_kl", _kl("xw", seeded=True, **attrs))
    for wrt in ("x", "w", "xw"):
        made[f"linear_log_probs {wrt}"] = ("linear_log_probs_bwd", _log_probs(wrt))
    made["linear_log_probs shaped"] = ("linear_log_probs_bwd", _log_probs("xw", scaling=0.7, divisor=1.3, cap=4.0))
    made["linear_log_probs alone"] = ("linear_log_probs", _log_probs(""))
    return made


def _glu(wrt: str, act: str = "silu") -> Case:
    return Case(lambda a, b: glu(a, b, act=act), {"a": normal(3, 7, 13, scale=3), "b": normal(3, 7, 13)}, tuple(wrt))


def _lora(wrt: str, *, bias: bool, waits: bool) -> Case:
    """`waits`: another product reads x too, so that a cotangent waits at x: `acc`."""

    def build(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        y = lora_linear(x, w, c, a, b, scaling=1.5)
        return add(y, linear(x, w)) if waits else y

    arrays = {"x": normal(2, 5, 13), "w": normal(7, 13), "a": normal(3, 13), "b": normal(7, 3)}
    return Case(build, arrays | ({"c": normal(7)} if bias else {}), tuple(wrt), kept=("a", "b"))


LORA = {
    f"{wrt}{' bias' if bias else ''}{' waiting' if waits else ''}": _lora(wrt, bias=bias, waits=waits)
    for wrt in ("xab", "ab", "x", "b", "xw")
    for bias in (False, True)
    for waits in (False, True)
}
"""Of `lora_linear`, which cpu_native alone of torch's backends fuses."""


def _cases() -> dict[str, tuple[str, Case]]:
    made: dict[str, tuple[str, Any]] = {}
    for when in ("before", "after"):
        for wrt in ("x", "w", "xw"):
            for waits in (False, True):
                name = f"rms_norm {when} {wrt}{' waiting' if waits else ''}"
                made[name] = ("rms_norm_bwd", _norm(3, 33, when, wrt, waits=waits))
    made["rms_norm of one column"] = ("rms_norm_bwd", _norm(5, 1, "before", "xw", waits=True))
    for dim in (1, 33, 130):
        made[f"rms_norm offset {dim}"] = ("rms_norm_bwd", _norm(3, dim, "after", "xw", waits=True, offset=1.0))
    made["rms_norm of heads"] = ("rms_norm_bwd", _head_norm(10))
    for wrt in ("x", "w", "b", "xwb"):
        made[f"layer_norm {wrt}"] = ("layer_norm_bwd", _layer_norm(3, 33, wrt))
    made["layer_norm without a bias"] = ("layer_norm_bwd", _layer_norm(3, 33, "xw", biased=False))
    made["layer_norm composed"] = ("layer_norm_bwd", _layer_norm(3, 33, "xw", biased=False, composed=True))
    made["rms_norm alone"] = ("rms_norm", _norm(3, 130, "before", "", waits=False))
    for dim in (2, 10, 64):
        for batch in (1, 2):
            made[f"rope {dim} {batch}"] = ("rope_bwd", _rope(dim, batch))
    for upcast in ("", "input", "terms"):
        for interleaved in (False, True):
            for width in (10, 13):
                name = f"rope {upcast or 'plain'}{' interleaved' if interleaved else ''} 10 of {width}"
                attrs = {"interleaved": interleaved, "upcast": upcast}
                made[name] = ("rope_bwd", _rope(10, 2, width=width, **attrs))
    for wrt in ("a", "b", "ab"):
        made[f"glu {wrt}"] = ("glu_bwd", _glu(wrt))
    for act in sorted(ACTIVATIONS.keys() - {"silu"}):
        made[f"glu {act}"] = ("glu_bwd", _glu("ab", act))
    for mask in ("causal", "padded", "packed", "none"):
        for heads, groups in ((3, 3), (6, 2), (5, 1)):
            made[f"attention {mask} {heads}/{groups}"] = ("attention_bwd", _attention(heads, groups, 7, 10, mask))
    for mask in ("padded", "packed"):
        made[f"attention {mask} window"] = ("attention_bwd", _attention(6, 2, 7, 10, mask, window=3))
    for name, shaping in {
        "scaled": {"scaling": 0.3},
        "divided": {"divisor": 3.0},
        "capped": {"cap": 2.0},
        "all": {"scaling": 0.7, "divisor": 1.3, "cap": 4.0},
    }.items():
        for grads in ("", "xw"):
            case = _loss(grads, size=3.0, **shaping)
            made[f"linear_cross_entropy {name} {grads or 'none'}"] = ("linear_cross_entropy", case)
    for grads in ("", "x", "w", "xw"):
        made[f"linear_cross_entropy {grads or 'none'}"] = ("linear_cross_entropy", _loss(grads))
    made["linear_cross_entropy of another cotangent"] = ("linear_cross_entropy", _loss("xw", seeded=True))
    made["linear_cross_entropy of no trained row"] = ("linear_cross_entropy", _loss("xw", ignored=True))
    for op in (gelu_new, relu2):
        made[op.name] = (f"{op.name}_bwd", Case(op, {"x": normal(3, 7, 13, scale=3)}, ("x",)))
    return made


CASES: dict[str, tuple[str, Case]] = _cases()

HEADS: dict[str, tuple[str, Case]] = _heads()
"""Of the head's losses beside the plain cross-entropy, which cuda_triton alone fuses."""


def _group(members: str, *, together: bool, biased: bool = False) -> Case:
    """Layers of one input, "a" with an adapter and "-" without, and a cotangent that waits at it."""
    adapted = tuple(member == "a" for member in members)
    arrays = {"x": normal(2, 5, 13)}
    arrays |= {f"w{at}": normal(3 + 4 * at, 13) for at in range(len(members))}
    arrays |= {f"c{at}": normal(3 + 4 * at) for at in range(len(members)) if biased}
    adapters = {f"a{at}": normal(3, 13) for at, has in enumerate(adapted) if has}
    adapters |= {f"b{at}": normal(3 + 4 * at, 3) for at, has in enumerate(adapted) if has}

    def build(x: Tensor, *tensors: Tensor) -> Tensor:
        if any(adapted):
            attrs = {"adapted": adapted, "together": together, "scaling": 1.5}
            y = lora_linear_group(x, *tensors, biased=biased, **attrs)
        else:
            y = linear_group(x, *tensors, biased=biased)
        return concat(y, x, dim=-1)

    wrt = ("x", *adapters) if adapters else tuple(arrays)
    return Case(build, arrays | adapters, wrt, kept=tuple(adapters))


def _add_norm(when: str, wrt: str, offset: float = 0.0) -> Case:
    def build(x: Tensor, d: Tensor, w: Tensor) -> Tensor:
        total, y = add_rms_norm(x, d, w, eps=1e-5, weight_cast=when, offset=offset, factor=0.5)
        return add(total, y)

    return Case(build, {"x": normal(2, 3, 33), "d": normal(2, 3, 33), "w": normal(33)}, tuple(wrt))


def _heads_rope(dim: int, batch: int, **attrs: Any) -> Case:
    """Of query and key heads together."""
    angles = normal(batch, 1, 5, dim // 2, scale=2.0).repeat(1, 1, 1, 2)
    arrays = {"q": normal(2, 6, 5, dim), "k": normal(2, 2, 5, dim), "cos": angles.cos(), "sin": angles.sin()}

    def build(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return concat(*qk_norm_rope(q, k, None, None, cos, sin, **attrs), dim=1)

    return Case(build, arrays, ("q", "k"))


GROUPS: dict[str, tuple[str, Case]] = {
    **{
        f"lora_linear_group {members}{' apart' if not together else ''}{' bias' if biased else ''}": (
            "lora_linear_group_bwd",
            _group(members, together=together, biased=biased),
        )
        for members in ("aaa", "a-a", "aa")
        for together, biased in ((True, False), (True, True), (False, False))
    },
    "linear_group": ("linear_group_dw", _group("---", together=True)),
    "linear_group bias": ("linear_group_dw", _group("--", together=True, biased=True)),
    "add_rms_norm": ("add_rms_norm", _add_norm("before", "xdw")),
    "add_rms_norm of a delta": ("add_rms_norm", _add_norm("before", "d")),
    "add_rms_norm offset": ("add_rms_norm", _add_norm("after", "xdw", 1.0)),
    "qk_norm_rope": ("qk_norm_rope_bwd", _heads_rope(10, 1)),
    "qk_norm_rope of rows": ("qk_norm_rope_bwd", _heads_rope(64, 2)),
}
"""Of what fusion makes of several ops before a gradient is taken."""

CHUNKED: dict[str, tuple[Case, Case]] = {
    grads: (_loss(grads, rows=11), _loss(grads, rows=11, z_loss=0.05, smoothing=0.1)) for grads in ("", "x", "w", "xw")
}
"""Heads of more rows than a chunk that a test makes small: plain, and with every term."""
