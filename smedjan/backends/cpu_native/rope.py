"""The rotation in place, one of a pair's two places after the other: no rotated copy."""

from __future__ import annotations

import torch

from smedjan.backends.cpu_native.native.team import Step, call, step
from smedjan.backends.cpu_native.table import DTYPES, PLANNED, RULES, compiled
from smedjan.backends.planned.launch import Launches
from smedjan.graph.node import Node

LABEL = "cpu_native fused rope"


def _places(x, interleaved):
    """The first and the second place of each pair."""
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _rotate(x, cos, sin, sign, *, interleaved, upcast):
    dim = cos.shape[-1]
    part = x[..., :dim]
    if upcast:
        part, cos, sin = part.float(), cos.float(), sin.float()
    y = part * cos
    (first, second), (x1, x2), (sin1, sin2) = (_places(t, interleaved) for t in (y, part, sin))
    first.addcmul_(x2, sin1, value=-sign)
    second.addcmul_(x1, sin2, value=sign)
    y = y.to(x.dtype)
    return y if dim == x.shape[-1] else torch.cat((y, x[..., dim:]), dim=-1)


@RULES.rule("rope", label=LABEL)
def rope(x, cos, sin, **attrs):
    return _rotate(x, cos, sin, 1.0, **attrs)


@RULES.rule("rope_bwd", label=LABEL)
def rope_bwd(dy, cos, sin, **attrs):
    return _rotate(dy, cos, sin, -1.0, **attrs)


# Of plans: one pass over query and key heads. Formulas in native/src/rope_rows.c.

NATIVE = "native rope"


def _plain(node: Node) -> bool:
    """Terms that are rounded one by one (upcast "terms") are other roundings: aten's."""
    first = next(t for t in node.inputs if t is not None)
    return compiled(node) and not (node.attrs["upcast"] == "terms" and first.dtype != "float32")


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, y: torch.Tensor, sign: float, inter: bool) -> Step:
    batch, heads, tokens, width = x.shape
    assert x.stride(3) == y.stride(3) == 1, f"heads are not contiguous: {x.stride()}, {y.stride()}"
    assert cos.is_contiguous() and sin.is_contiguous()  # noqa: PT018
    flags = int(inter) | (2 if cos.shape[0] == 1 else 0)
    return step(
        f"rope_{DTYPES[x.dtype]}_{DTYPES[cos.dtype]}",
        (x, cos, sin, y),
        (batch, heads, tokens, width, cos.shape[-1], *x.stride()[:3], *y.stride()[:3], flags),
        (sign,),
    )


def _rope(sign: float):
    def bind(run: Launches, ins: tuple, outs: tuple, *, interleaved: bool, upcast: str) -> None:
        x, cos, sin = ins
        call(run, "rope", _turn(x, cos, sin, outs[0], sign, interleaved))

    return bind


PLANNED.kernel("rope", label=NATIVE, supports=_plain, inplace=((0, 0),), strided=True)(_rope(1.0))
PLANNED.kernel("rope_bwd", label=NATIVE, supports=_plain, inplace=((0, 0),), strided=True)(_rope(-1.0))


def _bare(node: Node) -> bool:
    """Heads without norms."""
    return _plain(node) and all(node.inputs[place] is None for place in (2, 3))


@PLANNED.kernel("qk_norm_rope", label=NATIVE, supports=_bare, inplace=((0, 0), (1, 1)), strided=True)
def planned_qk_norm_rope(run: Launches, ins: tuple, outs: tuple, *, interleaved: bool, **_: object) -> None:
    q, k, _, _, cos, sin = ins
    pairs = zip((q, k), outs, strict=True)
    steps = [_turn(x, cos, sin, y, 1.0, interleaved) for x, y in pairs if y is not None]
    call(run, "rope", *steps)


def _gradients(node: Node) -> tuple[tuple[int, int], ...]:
    wanted = [place for place in (0, 1) if node.attrs["needs"][place]]
    return tuple((at, place) for at, place in enumerate(wanted))


def _bare_bwd(node: Node) -> bool:
    return _plain(node) and all(node.inputs[place] is None for place in (4, 5))


@PLANNED.kernel("qk_norm_rope_bwd", label=NATIVE, supports=_bare_bwd, inplace=_gradients, strided=True)
def planned_qk_norm_rope_bwd(
    run: Launches, ins: tuple, outs: tuple, *, needs: tuple[bool, ...], interleaved: bool, **_: object
) -> None:
    cos, sin = ins[6:]
    dys = [dy for dy, need in zip(ins[:2], needs, strict=False) if need]
    pairs = zip(dys, outs, strict=True)
    steps = [_turn(dy, cos, sin, dx, -1.0, interleaved) for dy, dx in pairs if dx is not None]
    call(run, "rope_bwd", *steps)
