"""Values that wait on the host: copies to pinned memory and back, in the order of the launches around them.

They run in the stream of the program, so that no value is read before it has arrived.
"""

from __future__ import annotations

from torch import Tensor

from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches


@RULES.kernel("to_host", label="memcpy to host")
@RULES.kernel("from_host", label="memcpy from host")
def move(run: Launches, ins: tuple, outs: tuple) -> None:
    (x,), (y,) = ins, outs
    assert x.is_contiguous(), f"a transfer of strides {x.stride()}"
    run.library("memcpy between host and device", Tensor.copy_, y, x, non_blocking=True)
