"""aten's CPU flash attention, called once forward and once backward; it takes grouped heads and masks as they are."""

from __future__ import annotations

from smedjan.backends.cpu_native.table import RULES
from smedjan.backends.torch_reference import attention as aten

LABEL = "aten flash attention (CPU)"


@RULES.rule("attention", label=LABEL)
def attention(q, k, v, mask, *, causal, scale, implementation):
    if q.shape[2] == 1:
        return aten.sdpa_decode(q, k, v, mask, causal=False, scale=scale)
    return aten.sdpa(q, k, v, mask, causal=causal, scale=scale)


@RULES.rule("attention_bwd", label=LABEL)
def attention_bwd(dy, q, k, v, mask, y, lse, *, causal, scale, implementation):
    return aten.sdpa_bwd(dy, q, k, v, mask, y, lse, causal=causal, scale=scale)
