"""Dropout before an adapter, noise on embeddings."""

from __future__ import annotations

from smedjan.backends.cuda_triton.examples.example import Example, array

KEY = array(4, dtype="int64")
ATTRS = {"p": 0.05, "site": 17}

EXAMPLES = [
    Example(op="dropout", name="bf16 8192 x 4096", ins=(array(8192, 4096), KEY), attrs=ATTRS),
    Example(op="dropout", name="f32 8192 x 576", ins=(array(8192, 576, dtype="float32"), KEY), attrs=ATTRS),
    Example(op="dropout", name="bf16 of heads", ins=(array(4, 9, 2048, 64, order=(0, 2, 1, 3)), KEY), attrs=ATTRS),
    Example(op="keep_mask", name="8192 x 576", ins=(KEY,), attrs={**ATTRS, "shape": (8192, 576)}),
    Example(
        op="uniform", name="8192 x 576", ins=(KEY,), attrs={"shape": (8192, 576), "bound": 0.01, "site": 2**32 - 1}
    ),
]
