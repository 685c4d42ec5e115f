"""kv_write: new keys or values into their places of a cache.

    cache[b, k, start + t] = kv[b, k, t]

cache [batch, heads, capacity, dim], kv [batch, heads, tokens, dim], each with its own strides and contiguous heads;
start, an int64 on the device, is how many tokens the cache holds: the same launch serves every step of a generation.
Values are copied as they are. What would lie behind the capacity is not written.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "tokens", "capacity"])
def kv_write(
    cache,
    kv,
    start,
    cache_batch,
    cache_head,
    cache_token,
    kv_batch,
    kv_head,
    kv_token,
    heads,
    tokens,
    capacity,
    dim,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS tokens of one head; program (block of tokens, batch * heads + head)."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    place = tl.load(start) + token
    inside = ((token < tokens) & (place < capacity))[:, None] & (col < dim)[None, :]
    source = kv + batch * kv_batch + head * kv_head + token[:, None] * kv_token + col[None, :]
    target = cache + batch * cache_batch + head * cache_head + place[:, None] * cache_token + col[None, :]
    tl.store(target, tl.load(source, mask=inside), mask=inside)
