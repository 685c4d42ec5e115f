"""Values that wait on the host: out of the device's memory after the forward pass, back in time for the backward."""

from __future__ import annotations

from smedjan.graph.op import op
from smedjan.graph.tensor import Spec, Tensor


@op(pure=False)
def to_host(x: Tensor) -> Spec:
    """y = x in the host's memory"""
    return x.like()


@op(pure=False)
def from_host(x: Tensor) -> Spec:
    """y = x in the device's memory"""
    return x.like()
