"""aten's CPU flash attention, called once forward and once backward; it takes grouped heads and masks as they are.

It caps no scores: with a softcap, attention runs decomposed. Which dtype transformers takes for the softmax is a
rounding point that only an exact backend reproduces.
"""

from __future__ import annotations

from torch import Tensor

from smedjan.backends.cpu_native.table import PLANNED, RULES
from smedjan.backends.planned.launch import Launches
from smedjan.backends.torch_reference import attention as aten
from smedjan.graph.lowering import Bytes

LABEL = "aten flash attention (CPU)"


def uncapped(node):
    return not node.attrs["cap"]


@RULES.rule("attention", label=LABEL, supports=uncapped)
def attention(q, k, v, mask, *, causal, scale, implementation, cap, softmax_dtype):
    if q.shape[2] == 1:
        return aten.sdpa_decode(q, k, v, mask, causal=False, scale=scale)
    return aten.sdpa(q, k, v, mask, causal=causal, scale=scale)


@RULES.rule("attention_bwd", label=LABEL, supports=uncapped)
def attention_bwd(dy, q, k, v, mask, y, lse, *, causal, scale, implementation, cap, softmax_dtype):
    return aten.sdpa_bwd(dy, q, k, v, mask, y, lse, causal=causal, scale=scale)


# Of plans: aten's results, which it allocates, go to their places. Heads lie inside there, as projections read them.

INSIDE = (0, 2, 1, 3)


def _several(node):
    return uncapped(node) and node.inputs[0].shape[2] > 1


def _forward(q, k, v, mask, y, lse, causal, scale) -> None:
    made, sums = aten.sdpa(q, k, v, mask, causal=causal, scale=scale)
    y.copy_(made)
    if lse is not None:
        lse.copy_(sums)


def backward(dy, q, k, v, mask, y, lse, outs: tuple[Tensor | None, ...], causal, scale) -> None:
    made = aten.sdpa_bwd(dy, q, k, v, mask, y, lse, causal=causal, scale=scale)
    for array, out in zip(made, outs, strict=True):
        if out is not None:
            out.copy_(array)


def _made(besides: Bytes) -> Bytes:
    """aten's results, until they are copied, and what it takes besides."""
    return lambda node: sum(tensor.nbytes for tensor in node.outputs) + besides(node)


@PLANNED.kernel("attention", label=LABEL, supports=_several, order={0: INSIDE}, temporaries=_made(aten.forward_bytes))
def planned_attention(run: Launches, ins: tuple, outs: tuple, *, causal: bool, scale: float, **_: object) -> None:
    y, lse = outs
    y = run.scratch(tuple(ins[0].shape), ins[0].dtype) if y is None else y
    run.library(LABEL, _forward, *ins, y, lse, causal, scale)


@PLANNED.kernel(
    "attention_bwd",
    label=LABEL,
    supports=uncapped,
    order=dict.fromkeys(range(3), INSIDE),
    strided=True,
    temporaries=_made(aten.backward_bytes),
)
def planned_attention_bwd(run: Launches, ins: tuple, outs: tuple, *, causal: bool, scale: float, **_: object) -> None:
    run.library(LABEL, backward, *ins, outs, causal, scale)
