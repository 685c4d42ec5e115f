"""Which ops run on this backend, and how: Triton kernels, views, and calls of the libraries that `launch` names.

The table has no parent: what is not in it is decomposed into what is, or an error that names the op.
"""

from __future__ import annotations

from smedjan.backends.cuda_triton import (  # noqa: F401  (each fills RULES)
    activation,
    attention,
    cache,
    decode,
    elementwise,
    embedding,
    fp8,
    glu,
    library_attention,
    linear,
    lora,
    loss,
    norm,
    offload,
    optimizer,
    quantized,
    random,
    rope,
    shape,
)
from smedjan.backends.cuda_triton.table import RULES

__all__ = ["RULES"]
