"""Parts that no plan could put where they belong, and the gradients of slices (phi3's qkv)."""

from __future__ import annotations

from smedjan.backends.cuda_triton.examples.example import Example, array

HEADS = array(4, 8, 2048, 128, order=(0, 2, 1, 3))

EXAMPLES = [
    Example(
        op="concat", name="bf16 qkv of 4096 and 1024", ins=(array(8192, 4096), array(8192, 1024)), attrs={"dim": -1}
    ),
    Example(
        op="slice_last_bwd", name="bf16 1024 of 6144", ins=(array(8192, 1024),), attrs={"size": 6144, "start": 4096}
    ),
    Example(op="zeros_like", name="bf16 8192 x 1024", ins=(array(8192, 1024),)),
    Example(op="repeat_kv", name="bf16 8 heads to 32", ins=(HEADS,), attrs={"times": 4}),
    Example(op="repeat_kv_bwd", name="bf16 32 heads to 8", ins=(array(4, 32, 2048, 128),), attrs={"times": 4}),
]

EXPLAINED = {
    "repeat_kv": "a launch a repeat, each reads the heads again; the attention kernels group heads by themselves"
}
