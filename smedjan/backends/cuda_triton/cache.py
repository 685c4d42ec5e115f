"""The key/value cache on Triton: written at a length that the device holds, read whole by `cached_attention`."""

from __future__ import annotations

from smedjan.backends.cuda_triton.kernels import cache as kernels
from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.table import RULES
from smedjan.backends.planned.launch import Launches


@RULES.kernel("kv_write", label="triton kv_write")
def kv_write(run: Launches, ins: tuple, outs: tuple) -> None:
    """cache [B, K, S, D], kv [B, K, T, D], start [] int64: cache[:, :, start : start + T] = kv"""
    _, kv, start = ins
    (cache,) = outs
    batch, heads, tokens, dim = kv.shape
    assert cache.stride(3) == kv.stride(3) == 1, f"heads are not contiguous: {cache.stride()}, {kv.stride()}"
    tile = common.copy_tile(dim)
    run.kernel(
        kernels.kv_write,
        (common.cdiv(tokens, tile.rows), batch * heads),
        cache,
        kv,
        start,
        *cache.stride()[:3],
        *kv.stride()[:3],
        heads,
        tokens,
        cache.shape[2],
        dim,
        ROWS=tile.rows,
        COLS=tile.cols,
        **tile.options,
    )
