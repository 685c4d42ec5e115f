"""aten's CPU flash attention, called once forward and once backward; it takes grouped heads and masks as they are.

It caps no scores: with a softcap, attention runs decomposed. Which dtype transformers takes for the softmax is a
rounding point that only an exact backend reproduces.
"""

from __future__ import annotations

from smedjan.backends.cpu_native.table import RULES
from smedjan.backends.torch_reference import attention as aten

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
