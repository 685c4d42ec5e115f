"""Each launch shape of attention that `tuned.json` ships: every head dim and dtype, forward, backward and decoding."""

from __future__ import annotations

from smedjan.backends.cuda_triton import tuned
from smedjan.backends.cuda_triton.attention import HEAD_DIMS
from smedjan.backends.cuda_triton.examples.attention import INSIDE, stacked
from smedjan.backends.cuda_triton.examples.example import Example, array
from smedjan.backends.torch_reference.elementwise import NAMES

TOKENS, HEADS = 512, (4, 2)


def _of(dim: int, dtype: str, name: str) -> list[Example]:
    """Capped at 256 too: the cap has launch shapes of its own there."""
    q, k, v = stacked(1, TOKENS, HEADS, dim, dtype)
    y = array(1, HEADS[0], TOKENS, dim, dtype=dtype, order=INSIDE)
    lse = array(1, HEADS[0], TOKENS, dtype="float32")
    given, attrs = (q, k, v, None, None, None, None), {"scale": dim**-0.5}
    cache = array(1, HEADS[1], TOKENS, dim, dtype=dtype)
    token = array(1, HEADS[0], 1, dim, dtype=dtype, order=INSIDE)
    new = (token, cache, cache, None, array(dtype="int64"), None)
    behind, backward = (y, *given, y, lse), {**attrs, "needs_sinks": False}
    capped = {**backward, "cap": 50.0}
    return [
        Example(op="flash_attention", name=name, ins=given, attrs=attrs),
        Example(op="flash_attention_bwd", name=name, ins=behind, attrs=backward),
        *[Example(op="flash_attention_bwd", name=f"{name}, capped", ins=behind, attrs=capped)] * (dim == 256),
        Example(op="cached_attention", name=name, ins=new, attrs=attrs, fill={4: TOKENS}),
    ]


EXAMPLES = [
    example
    for dim in HEAD_DIMS
    for dtype, short in tuned.NAMES.items()
    for example in _of(dim, NAMES[dtype], f"{short} head dim {dim}")
]
